"""Compile every kernel into numba's cache."""

import sys
from time import perf_counter

from . import KERNELS, load, missing, on_disk

if missing():
    sys.exit(missing())
for name in KERNELS:
    start, known = perf_counter(), on_disk(name)
    load(name)
    print(f"{name:<16} {'loaded' if known else 'compiled'} in {perf_counter() - start:.2f} s", flush=True)
