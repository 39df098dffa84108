"""Benchmarks, one module for each part: `python -m modernenc.bench`. Speeds are compared as ratios of interleaved turns."""
