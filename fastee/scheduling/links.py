"""Links written as people write them: "20mbit 10ms"."""

from __future__ import annotations

import re

_RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_LINK = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]?bit)(?:/s)?\s+([0-9]*\.?[0-9]+)\s*(s|ms|us)\s*", re.IGNORECASE | re.ASCII)


def parse_link(text: str) -> tuple[float, float]:
    """Return (bit/s, one-way delay in seconds) of a link such as ``"20mbit 10ms"``.

    Rates: bit, kbit, mbit, gbit (powers of ten); times: us, ms, s. A rate of 0 means that the link is down.

    >>> parse_link("20mbit 10ms")
    (20000000.0, 0.01)
    """
    if not isinstance(text, str):
        raise TypeError(f"link must be a string such as '20mbit 10ms', got {type(text).__name__}")
    found = _LINK.fullmatch(text) if len(text) <= 64 else None
    if found is None:
        raise ValueError(f"link must be a rate and a delay such as '20mbit 10ms', got {text[:64]!r}")
    rate, rate_unit, delay, delay_unit = found.groups()
    return float(rate) * _RATES[rate_unit.lower()], float(delay) * _TIMES[delay_unit.lower()]
