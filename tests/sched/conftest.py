"""Both cores are held to the same tests."""

import pytest

from fastee.scheduling import scheduler as face


@pytest.fixture(params=["native", "twin"])
def native(request) -> bool:
    """True for the C++ core, False for the twin."""
    if request.param == "native" and face._C is None:
        pytest.skip("fastee._C is not built")
    return request.param == "native"
