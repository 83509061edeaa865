"""Options of ``pytest benchmarks``."""


def pytest_addoption(parser):
    parser.addoption("--shapes", default="headline", choices=("headline", "small", "all"), help="of the kernels' benchmarks")
