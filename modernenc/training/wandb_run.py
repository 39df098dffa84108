"""Log to Weights & Biases: a service that may be absent, unreachable or die, none of which ends a run."""

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger

from modernenc.config import Run
from modernenc.saved_config import plain

log = logging.getLogger(__name__)


class WandbRun(WandbLogger):
    """Logs until the service is gone, and then no more."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Send some numbers."""
        self._attempt(lambda: super(WandbRun, self).log_metrics(metrics, step))

    def finalize(self, status: str) -> None:
        """Send what is left."""
        self._attempt(lambda: super(WandbRun, self).finalize(status))

    def _attempt(self, send: Callable[[], None]) -> None:
        if self._experiment is None:
            return
        try:
            send()
        except Exception as error:  # of its own, of sockets, of its event loop
            self._experiment = None
            log.warning("Weights & Biases is gone, and nothing more is sent there; metrics.csv has it all: %r", error)
            _close()


def open_run(run: Run) -> WandbRun:
    """Begin or continue the run's own run there; without login or network it logs offline."""
    if wandb.run is not None:  # the previous run's, where several are trained one after the other
        with suppress(Exception):
            wandb.finish()
    settings = {
        "project": run.logger.project,
        "name": f"{run.recipe}/{Path(run.run_dir).name}" + (f", rollback {run.rollbacks}" if run.rollbacks else ""),
        "group": run.logger.group,
        "dir": run.run_dir,
        "id": run.logger.run_id,  # an id that exists continues that run
        "resume": "allow",
        "config": plain(run),
    }
    try:
        offline = run.logger.wandb == "offline"
        if not offline and not wandb.login(prompt=False):
            log.warning("logger.wandb=online, but there is no login: logging offline; run wandb login, then wandb sync")
            offline = True
        begun = wandb.init(**settings, mode="offline" if offline else "online")
    except wandb.Error as error:
        said = " ".join(str(error).split())
        log.warning("logger.wandb=online, but the service does not answer: logging offline; later run wandb sync: %s", said)
        begun = wandb.init(**settings, mode="offline")
    return WandbRun(experiment=begun)


def _close() -> None:
    """Forget a service that is gone, which would fail again, with a traceback, when the process ends."""
    with suppress(Exception):
        wandb.teardown()
