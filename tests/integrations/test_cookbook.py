"""Every Python block of the cookbook runs, each page in a process of its own."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs" / "cookbook").glob("*.md"))
NEEDS = {"bert": ["transformers"], "llm": ["transformers"], "jax": ["jax", "flax"], "onnx": ["onnxruntime", "onnxscript"]}
BLOCKS = [(p.stem, i, block) for p in PAGES for i, block in enumerate(re.findall(r"^```python\n(.*?)^```$", p.read_text(), re.S | re.M))]


def test_every_page_but_the_list_has_a_block():
    assert {stem for stem, _, _ in BLOCKS} == {p.stem for p in PAGES} - {"README"} and len(BLOCKS) >= 7


@pytest.mark.parametrize("stem, number, block", [pytest.param(*b, id=f"{b[0]}-{b[1]}") for b in BLOCKS])
def test_the_page_runs(stem, number, block, tmp_path):
    missing = [m for m in NEEDS.get(stem, []) if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(f"needs {missing}")
    program = tmp_path / f"{stem}_{number}.py"
    program.write_text(block)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
