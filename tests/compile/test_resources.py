"""Every Triton kernel compiled ahead of time for sm_80, sm_90 and sm_100: it fits, and needs no more than was recorded."""

import json
import os

import pytest

from fastee.kernels import triton

pytestmark = [pytest.mark.slow, pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))]
LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # bytes of shared memory that a block can have


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    from tests.compile import aot

    if triton.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    try:
        return aot.measure()
    finally:
        os.environ.pop("TRITON_CACHE_DIR") if before is None else os.environ.update(TRITON_CACHE_DIR=before)


@pytest.mark.timeout(900)
def test_every_kernel_fits_every_architecture(compiled):
    from tests.compile import aot

    for name, targets in compiled.items():
        assert set(targets) == {f"sm_{c}" for c in aot.fits(name)}, name
        for target, needs in targets.items():
            assert needs["shared"] <= LIMITS[target], (name, target, needs)
            assert needs["registers"] <= 255 and needs["local"] == 0, (name, target, needs)
            assert needs["stack"] <= 8, (name, target, needs)  # nothing spilled; 8 bytes are a scalar's home


def test_large_heads_use_the_tensor_cores_and_copy_engines_of_their_chip(compiled):
    """A product that falls back to a warp's own tensor core instruction, or to none, would be some times slower and still right."""
    heads = {name: targets for name, targets in compiled.items() if "engines" in targets["sm_90"]}
    large = {name: targets for name, targets in heads.items() if "tiles" in name or "vocabulary" in name}
    assert len(large) >= 8
    for name, targets in large.items():
        bulk = name.startswith("bulk")
        for target, needs in targets.items():
            assert {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[target] in needs["engines"], (name, target, needs)
            assert ("UTMALDG" in needs["engines"]) == bulk, (name, target, needs)
            assert "pooled" in name or ("LDGSTS" in needs["engines"]) != bulk, (name, target, needs)
    assert sum(name.startswith("bulk") for name in large) == 2


@pytest.mark.parametrize("name", sorted(p.stem for p in (triton.HERE / "heuristics").glob("nvidia-*.json")))
def test_shipped_heuristics_fit(name):
    from fastee.kernels.triton._tuning import Tuning, tuning
    from tests.compile import aot

    if triton.INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    defaults = aot.recorded(Tuning())
    changed = {n: what for n, what in aot.recorded(tuning(name)).items() if what != defaults.get(n) and "head_kernel" in n}
    assert changed, f"{name}.json changes no kernel of a head"
    for n, what in changed.items():
        needs = aot.build((what, 90))
        assert needs["shared"] <= LIMITS["sm_90"] and needs["local"] == 0, (n, needs)


def test_every_kernel_is_compiled(compiled):
    """A kernel that no call reaches would be tested by nobody."""
    import ast

    launched = set()
    for path in triton.HERE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "launch":
                launched.add(node.args[0].id)
    assert launched and launched == {name.rsplit(": ", 1)[1] for name in compiled}


def test_resources_do_not_grow(compiled):
    import triton as language

    from tests.compile import aot

    recorded = json.loads(aot.RESOURCES.read_text())["triton"]
    if language.__version__ != recorded["version"]:
        pytest.skip(f"resources.json was recorded with triton {recorded['version']}, this is {language.__version__}")
    grown = [
        f"{name} {target} {what}: {recorded['kernels'][name][target][what]} -> {value}"
        for name, targets in compiled.items()
        for target, needs in targets.items()
        for what, value in needs.items()
        if what != "engines" and value > recorded["kernels"].get(name, {}).get(target, {}).get(what, -1)
    ]
    assert not grown, "more than recorded; if it is worth it: python -m tests.compile.aot --write\n" + "\n".join(grown)
