"""Measurements, one module each: `python -m modernenc.bench`, `.loop`, `.index`. Ratios within one process, taken in turn."""
