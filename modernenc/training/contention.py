"""Notice that other programs use the cores on which a run trains.

Each parallel region ends when its slowest thread does, so a single core that is shared can make a step several times as long.
"""

import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

log = logging.getLogger(__name__)

_INTERVAL_S = 30
_TOLERATED = 0.1
"""Fraction of the time that a thread may wait for a core."""


class ContentionMonitor(L.Callback):
    """Warns, once, that the threads of a run on a CPU wait for cores that other programs use."""

    def __init__(self) -> None:
        self._since: tuple[float, float] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, if there is something to measure, and the advice was not taken yet."""
        if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
            return
        if trainer.strategy.root_device.type == "cpu" and torch.get_num_threads() > 1 and waited_s() is not None:
            self._since = time.monotonic(), waited_s() or 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the last half a minute."""
        if self._since is None or (seconds := time.monotonic() - self._since[0]) < _INTERVAL_S:
            return
        threads, total = torch.get_num_threads(), waited_s() or 0
        share = (total - self._since[1]) / seconds / threads
        self._since = time.monotonic(), total
        if share > _TOLERATED:
            log.warning(
                "other programs use the cores: each of %d threads waited %.0f %% of the last %.0f s for one, and a step takes "
                "as long as the slowest; free the cores, or stop (Ctrl-C) and resume with OMP_WAIT_POLICY=PASSIVE before the "
                "command, or with OMP_NUM_THREADS=%d",
                *(threads, 100 * share, seconds, threads // 2),
            )
            self._since = None


def waited_s() -> float | None:
    """Return for how long the threads of this process have been ready without a core, in seconds in all.

    None where the system does not tell: the file is Linux's. A thread that ends takes its time with it.
    """
    waited = []
    for thread in os.scandir("/proc/self/task") if Path("/proc/self/task").is_dir() else ():
        with suppress(OSError, IndexError, ValueError):
            waited.append(int(Path(thread.path, "schedstat").read_text().split()[1]))
    return sum(waited) / 1e9 if waited else None
