"""The compiled model and its twin are held to the same tests."""

import pytest

from fastee import native as native_parts


@pytest.fixture
def compiled():
    """Skips where the C++ model is not built."""
    if native_parts.core is None:
        pytest.skip("fastee._C is not built")


@pytest.fixture(params=["native", "twin"])
def native(request) -> bool:
    """True for the C++ model, False for the twin."""
    if request.param == "native" and native_parts.core is None:
        pytest.skip("fastee._C is not built")
    return request.param == "native"
