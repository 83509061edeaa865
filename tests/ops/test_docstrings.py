"""Every op's example runs and prints what its docstring says."""

import doctest

import pytest

from fastee import ops

EXAMPLES = [t for name in ops.__all__ if callable(f := getattr(ops, name)) for t in doctest.DocTestFinder(recurse=False).find(f, name) if t.examples]


def test_every_op_has_an_example():
    functions = {name for name in ops.__all__ if name.islower()}
    assert functions <= {t.name for t in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda t: t.name)
def test_the_example_prints_what_it_says(example):
    said = []
    failed, tried = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert tried and not failed, "".join(said)
