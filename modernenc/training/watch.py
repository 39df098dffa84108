"""Report that training goes wrong: a spike of the loss or the gradient norm, or a loss that has stopped falling.

Each recorded row is compared with those of the last `watch.window_tokens` in its phase by a robust z-score: distance from the
median in units of the median absolute deviation times 1.4826, which for normal noise is the standard deviation.
"""

import logging
import math
import shlex
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import lightning.pytorch as L

from modernenc.config import Run
from modernenc.run_folder.checkpoints import FOLDER, tokens_seen
from modernenc.training.module import Pretraining
from modernenc.training.recorder import MetricsWriter

log = logging.getLogger(__name__)

UNSTABLE = 3
"""Exit code of a run that stopped by `watch.action=stop`."""
_ENOUGH = 20
"""Rows before anything is said."""
_LEAST_SPREAD = 0.002
"""Relative to the median: what nearly equal rows are taken to vary by."""


class Observation(NamedTuple):
    """What is judged of one row of metrics."""

    tokens_seen: int
    loss: float
    log_grad_norm: float


def z_score(value: float, others: list[float]) -> float:
    """Return the robust distance of a value from others, in standard deviations."""
    middle = median(others)
    spread = 1.4826 * median(abs(other - middle) for other in others)
    return (value - middle) / max(spread, _LEAST_SPREAD * abs(middle), 1e-12)


class Series:
    """The rows of one objective in one phase, as far back as `watch.window_tokens` reaches."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.spikes: list[Observation] = []
        """The last rows, as far back as each was a spike."""
        self._points: list[Observation] = []
        self._next_plateau = 0

    def update(self, point: Observation) -> str:
        """Compare a row of metrics with the earlier ones, then append it; return a warning, or an empty string."""
        warning = self._judge(point) if len(self._points) >= _ENOUGH else ""
        oldest = point.tokens_seen - self.run.watch.window_tokens
        self._points = [other for other in [*self._points, point] if other.tokens_seen >= oldest]
        return warning

    def _judge(self, point: Observation) -> str:
        loss = z_score(point.loss, [other.loss for other in self._points])
        gradient = z_score(point.log_grad_norm, [other.log_grad_norm for other in self._points])
        if not all(math.isfinite(value) for value in point[1:]) or max(loss, gradient) > self.run.watch.z_threshold:
            self.spikes.append(point)
            return (
                f"spike: loss {point.loss:.3f} ({loss:.1f} deviations above its median), "
                f"log gradient norm {point.log_grad_norm:.2f} ({gradient:.1f})"
            )
        self.spikes = []
        return self._plateau(point)

    def _plateau(self, point: Observation) -> str:
        """Return a warning if the median of the newer half of the window is not below the median of the older half."""
        reach = point.tokens_seen - self._points[0].tokens_seen
        if reach < 0.9 * self.run.watch.window_tokens or point.tokens_seen < self._next_plateau:
            return ""
        middle = point.tokens_seen - reach / 2
        older = median(other.loss for other in self._points if other.tokens_seen <= middle)
        newer = median(other.loss for other in self._points if other.tokens_seen > middle)
        if newer < older:
            return ""
        self._next_plateau = point.tokens_seen + int(self.run.watch.window_tokens)
        return f"plateau: the median loss of the last {reach // 2:,} tokens is {newer:.4f}, {older:.4f} before"


class SpikeMonitor(L.Callback):
    """Warns of spikes and plateaus; with `watch.action=stop` ends the run after `watch.patience` spikes in a row."""

    def __init__(self, run: Run, writer: MetricsWriter) -> None:
        self.run = run
        self.writer = writer
        self._phase = ""
        self._series: dict[str, Series] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the series from the rows that were written before."""
        if trainer.is_global_zero:
            for row in self.writer.metrics.read():
                self._of(row).update(_observation(row))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the new rows."""
        module = cast(Pretraining, pl_module)
        if self.run.watch.action == "off" or not trainer.is_global_zero:
            return
        for row in self.writer.latest_rows:
            if row["step"] != module.step:
                continue
            series = self._of(row)
            warning = series.update(_observation(row))
            if warning:
                log.warning("step %d: %s", module.step, warning)
            if self.run.watch.action == "stop" and len(series.spikes) >= self.run.watch.patience:
                module.abort_reason = self._advice(module, series.spikes[0].tokens_seen)

    def _of(self, row: dict[str, Any]) -> Series:
        """Return the series that a row belongs to."""
        if row["phase"] != self._phase:
            self._phase, self._series = row["phase"], {}
        return self._series.setdefault(row["objective"], Series(self.run))

    def _advice(self, module: Pretraining, first: int) -> str:
        folder = Path(self.run.run_dir) / FOLDER
        good = [path for path in folder.glob("*.ckpt") if tokens_seen(path) < first]
        if not good:
            return f"unstable since {first:,} tokens, and no checkpoint is older; start again with a lower learning rate"
        last = max(good, key=tokens_seen)
        return (
            f"unstable since {first:,} tokens; go back to {last} under another learning rate, or past data that hurt: "
            f"python -m modernenc.resume {shlex.quote(str(last))} --rollback --skip-tokens "
            f"{module.tokens_seen - int(tokens_seen(last))} optim.lr={self.run.optim['lr'] / 2:g}"
        )


def _observation(row: dict[str, Any]) -> Observation:
    return Observation(int(row["tokens_seen"]), float(row["loss"]), math.log(max(float(row["grad_norm"]), 1e-12)))
