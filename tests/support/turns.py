"""Work for the benchmarks that costs nothing; in a module that any process can import."""

import os
import time
from pathlib import Path

import torch

from modernenc.bench.interleave import StepWork, Turn


def candidate(dies_at: int = -1, needs_gb: float = 0) -> Turn:
    """Return a candidate whose work names its process and the turn's number.

    It ends its process at the turn `dies_at`, and allocates `needs_gb` GB at each.
    """

    def turn(number: int) -> StepWork:
        if number == dies_at:
            os._exit(9)
        torch.zeros(int(needs_gb * 2**28))
        return StepWork(os.getpid(), float(number))

    return turn


def touch_after(path: Path, seconds: float) -> dict[str, float]:
    """Create a file after some seconds, and return no measurements."""
    time.sleep(seconds)
    path.touch()
    return {}
