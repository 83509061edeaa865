"""The benchmark suite: ``python -m benchmarks list``. Method: docs/benchmarks.md; harness: fastee.testing.bench."""
