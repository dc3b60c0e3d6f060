"""Measurements: each module runs on its own and prints what it found; results stand in docs/benchmarks.md."""
