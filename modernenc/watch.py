"""Tell when training goes wrong: a spike of loss or gradient, or a loss that falls no more.

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

from modernenc.checkpoints import FOLDER, tokens_seen
from modernenc.config import Run
from modernenc.recorder import Recorder
from modernenc.trainer import Pretraining

log = logging.getLogger(__name__)

UNSTABLE = 3
"""Exit code of a run that stopped by `watch.action=stop`."""
_ENOUGH = 20
"""Rows before anything is said."""
_LEAST_SPREAD = 0.002
"""Relative to the median: what nearly equal rows are taken to vary by."""


class Point(NamedTuple):
    """One recorded row."""

    tokens_seen: int
    loss: float
    log_grad_norm: float


def z_score(value: float, others: list[float]) -> float:
    """Robust distance of a value from others, in standard deviations."""
    middle = median(others)
    spread = 1.4826 * median(abs(other - middle) for other in others)
    return (value - middle) / max(spread, _LEAST_SPREAD * abs(middle), 1e-12)


class Series:
    """The rows of one objective in one phase, as far back as the window reaches."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.spikes: list[Point] = []
        """The last rows, as far back as each was a spike."""
        self._points: list[Point] = []
        self._next_plateau = 0

    def take(self, point: Point) -> str:
        """Compare a row with those before and put it to them; what is wrong with it, or nothing."""
        warning = self._judged(point) if len(self._points) >= _ENOUGH else ""
        oldest = point.tokens_seen - self.run.watch.window_tokens
        self._points = [other for other in [*self._points, point] if other.tokens_seen >= oldest]
        return warning

    def _judged(self, point: Point) -> str:
        loss = z_score(point.loss, [other.loss for other in self._points])
        gradient = z_score(point.log_grad_norm, [other.log_grad_norm for other in self._points])
        if not all(math.isfinite(value) for value in point[1:]) or max(loss, gradient) > self.run.watch.z:
            self.spikes.append(point)
            return (
                f"spike: loss {point.loss:.3f} ({loss:.1f} deviations above its median), "
                f"log gradient norm {point.log_grad_norm:.2f} ({gradient:.1f})"
            )
        self.spikes = []
        return self._plateau(point)

    def _plateau(self, point: Point) -> str:
        """The median of the window's newer half is no lower than that of its older half."""
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


class Watch(L.Callback):
    """Warns of spikes and plateaus; with `watch.action=stop` ends the run after `watch.patience` spikes in a row."""

    def __init__(self, run: Run, recorder: Recorder) -> None:
        self.run = run
        self.recorder = recorder
        self._phase = ""
        self._series: dict[str, Series] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up what was recorded before."""
        if trainer.is_global_zero:
            for row in self.recorder.metrics.read():
                self._of(row).take(_point(row))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at new rows."""
        module = cast(Pretraining, pl_module)
        if self.run.watch.action == "off" or not trainer.is_global_zero:
            return
        for row in self.recorder.last:
            if row["step"] != module.step:
                continue
            series = self._of(row)
            warning = series.take(_point(row))
            if warning:
                log.warning("step %d: %s", module.step, warning)
            if self.run.watch.action == "stop" and len(series.spikes) >= self.run.watch.patience:
                module.instability = self._advice(module, series.spikes[0].tokens_seen)

    def _of(self, row: dict[str, Any]) -> Series:
        """The rows that a row belongs to."""
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


def _point(row: dict[str, Any]) -> Point:
    return Point(int(row["tokens_seen"]), float(row["loss"]), math.log(max(float(row["grad_norm"]), 1e-12)))
