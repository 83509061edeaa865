"""Every CUDA kernel compiled for sm_80, sm_90 and sm_100: without a warning, no local memory, 16-byte loads where they
are promised, and no more registers than were recorded."""

import json
import re

import pytest

from tests.compile import cuda

pytestmark = [pytest.mark.slow, pytest.mark.skipif(cuda.NVCC is None, reason="nvcc is not installed (CUDA toolkit 12.8 or newer)")]

# What reads its input in 16 bytes: through registers (LDG) or past them into shared memory (LDGSTS).
WIDE = {
    "exit_pack<1,1>": "LDG.*128",
    "exit_pack<2,4>": "LDG.*128",
    "pack_planes": "LDG.*128",
    "quantize_rows": "LDGSTS.*128",
    "pool": "LDG.*128",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


@pytest.fixture(scope="module")
def compiled(folder):
    return cuda.measure(folder)


@pytest.mark.timeout(600)
def test_every_kernel_uses_registers_only(compiled):
    names = {
        "exit_pack<1,1>",
        "exit_pack<2,4>",
        "compact",
        "quantize_rows",
        "pack_planes",
        "unpack_planes",
        "planes_header",
        "pool",
        "choose",
    }
    assert set(compiled) == names
    for name, targets in compiled.items():
        assert set(targets) == {f"sm_{c}" for c in cuda.TARGETS}, name
        for target, needs in targets.items():
            assert needs["stack"] == 0 and needs["spilled"] == 0 and needs["shared"] == 0, (name, target, needs)


def test_resources_do_not_grow(compiled):
    recorded = json.loads(cuda.RESOURCES.read_text())["cuda"]
    if cuda.release() != recorded["version"]:
        pytest.skip(f"resources.json was recorded with nvcc {recorded['version']}, this is {cuda.release()}")
    grown = [
        f"{name} {target} {what}: {recorded['kernels'].get(name, {}).get(target, {}).get(what)} -> {value}"
        for name, targets in compiled.items()
        for target, needs in targets.items()
        for what, value in needs.items()
        if value > recorded["kernels"].get(name, {}).get(target, {}).get(what, -1)
    ]
    assert not grown, "more than recorded; if it is worth it: python -m tests.compile.cuda --write\n" + "\n".join(grown)


def test_machine_code_loads_sixteen_bytes_and_keeps_out_of_local_memory(compiled, folder):
    if cuda.cuobjdump() is None:
        pytest.skip("no cuobjdump (the CUDA toolkit's, or Triton's)")
    code = cuda.sass(folder)
    assert {name.rsplit(" ", 1)[0] for name in code} == set(compiled)
    for name, text in code.items():
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name} uses local memory"
        wide = WIDE.get(name.rsplit(" ", 1)[0])
        assert wide is None or re.search(wide, text), f"{name} has no {wide}"
        if name.startswith("exit_pack"):
            assert re.search(r"LDGSTS.*128", text), f"{name} copies no weights asynchronously"
