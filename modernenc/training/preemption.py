"""Stop at a step boundary on request: SIGTERM, SIGUSR1 (the cluster's time limit) or SIGINT (Ctrl-C).

The first signal is noted; all ranks learn of it with the step's own reduction, finish the step, save and end. The second one
ends the process at once, as it would by default.
"""

import logging
import os
import signal
from types import FrameType
from typing import Any, cast

import lightning.pytorch as L

from modernenc.data.worker import STOP_SIGNALS
from modernenc.training.module import Pretraining

log = logging.getLogger(__name__)

STOPPED = 75
"""Exit code of a run that saved on request and can be resumed: EX_TEMPFAIL of sysexits.h."""


class Preemption(L.Callback):
    """Handles the signals from the first step to the last."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the signal handlers."""
        module = cast(Pretraining, pl_module)

        def note(number: int, frame: FrameType | None) -> None:
            if module.stop_requested:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            module.stop_requested = True
            log.warning("%s: saving after this step; once more ends the run at once", signal.Signals(number).name)

        self._before = {number: signal.signal(number, note) for number in STOP_SIGNALS}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the handlers that were installed before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
