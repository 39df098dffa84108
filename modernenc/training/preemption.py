"""Stop at a step boundary on request: SIGTERM, SIGUSR1 (the cluster's time limit) or SIGINT (Ctrl-C).

The first signal is noted; all ranks learn of it with the step's own reduction, finish the step, save and end. The second one
ends the process at once, and so does `trainer.timeout_s` without an end of the step. Both work while the main thread is blocked
in a collective, where Python runs no signal handler: a thread is woken by the signal's number on a socket.
"""

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any, cast

import lightning.pytorch as L

from modernenc.exit_codes import KILLED, STOP_SIGNALS
from modernenc.training.module import Pretraining

log = logging.getLogger(__name__)


_ONE_REQUEST_S = 2
"""Seconds in which further signals belong to the first: a scheduler signals ranks, and their launcher passes its own on."""


class Preemption(L.Callback):
    """Handles the signals from the first step to the last."""

    def __init__(self) -> None:
        # Before Lightning installs its own, which would talk to the other ranks even when they are gone.
        self._handlers_before: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._wakeup = -1
        self._pipe: tuple[socket.socket, socket.socket] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the signal handlers, and start the thread that ends a blocked process."""
        module = cast(Pretraining, pl_module)

        def note(number: int, frame: FrameType | None) -> None:
            if not module.stop_requested:
                log.warning("%s: saving after this step; once more ends the run at once", signal.Signals(number).name)
            module.stop_requested = True

        for number in STOP_SIGNALS:
            signal.signal(number, note)
        reads, writes = self._pipe = socket.socketpair()
        writes.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(writes.fileno())
        threading.Thread(target=_end_blocked, args=(reads, module.run.trainer.timeout_s), daemon=True).start()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Do as at the end of a run that ends well, because another run may follow in this process."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the handlers that were installed before the run began, and end the thread."""
        if self._pipe is None:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._pipe[1].close()
        self._pipe = None


def _end_blocked(signals: socket.socket, timeout_s: float) -> None:
    """End the process at the second signal to stop, or `timeout_s` after the first, unless the socket is closed before."""
    with signals:
        while (number := signals.recv(1)) and number[0] not in STOP_SIGNALS:
            pass
        if not number:
            return
        asked = time.monotonic()
        why = "a second signal came"
        signals.settimeout(timeout_s)
        try:
            while (number := signals.recv(1)) and time.monotonic() - asked < _ONE_REQUEST_S:
                pass
            if not number:
                return
        except TimeoutError:
            why = f"no step ended within trainer.timeout_s={timeout_s:g}"
        log.error("ended without saving: %s; resume goes on from the newest checkpoint", why)
        logging.shutdown()
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(KILLED)
