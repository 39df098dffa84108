"""Work for the benchmarks that costs nothing; in a module that any process can import."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from modernenc.bench.turns import Turn, Work


@dataclass
class Sleeper:
    """A contestant whose work names the process that it is in, and which may end that process or need too much memory."""

    name: str
    dies_at: int = -1
    """The turn at which its process ends; -1 means none."""
    needs_gb: float = 0
    """Memory that a turn allocates."""

    def start(self) -> Turn:
        """Return its turns."""
        import torch

        def turn(number: int) -> Work:
            if number == self.dies_at:
                os._exit(9)
            torch.zeros(int(self.needs_gb * 2**28))
            return Work(os.getpid(), float(number))

        return turn


def touch_after(path: Path, seconds: float) -> dict[str, float]:
    """Create a file after some seconds, and return no measurements."""
    time.sleep(seconds)
    path.touch()
    return {}
