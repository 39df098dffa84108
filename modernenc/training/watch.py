"""Report that training goes wrong: skipped steps, a spike of the loss or the gradient norm, a loss that has stopped falling.

Each row of metrics is compared with those of the last `watch.window_tokens` in its phase by a robust z-score: distance from the
median in units of the median absolute deviation times 1.4826, which for normal noise is the standard deviation. The first rows
of a phase, whose lengths, rates and sources may be new, are compared with the phase before, and those of the first phase with
a model that knows nothing, whose gradient is not known: a spike is a loss half as high again, or a gradient norm ten times as
large.
"""

import logging
import math
import shlex
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import lightning.pytorch as L

from modernenc.config import Run
from modernenc.curriculum import CHOICES, OF_TEXT, WATCHED_ROWS
from modernenc.run_folder.checkpoints import last_until, tokens_seen
from modernenc.training.module import Pretraining
from modernenc.training.recorder import MetricsWriter

log = logging.getLogger(__name__)

_FIRST_LOSS, _FIRST_LOG_GRAD_NORM = 1.5, math.log(10)
"""In the first rows of a phase: the factor of the loss, and the rise of the log gradient norm, that count as a spike."""
_PLATEAU_ROWS = 20
"""Rows from which the medians of a window's halves are known well enough to say that a loss no longer falls."""
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
    """The rows of one objective in the present phase, as far back as `watch.window_tokens` reaches.

    `blind_loss` is the loss of a model that knows nothing.
    """

    def __init__(self, run: Run, blind_loss: float) -> None:
        self.run = run
        self.spikes: list[Observation] = []
        """The last rows, as far back as each was a spike."""
        self.since = 0
        """Position of the last row before these."""
        self._phase = ""
        self._points: list[Observation] = []
        self._before = [Observation(0, blind_loss, math.inf)]
        """The rows of the phase before."""
        self._next_plateau = 0

    def update(self, phase: str, point: Observation) -> str:
        """Compare a row of metrics with the earlier ones, then append it; return a warning, or an empty string."""
        if phase != self._phase:
            self._phase, self._points, self._before = phase, [], self._points or self._before
        warning = self._spike(point)
        if warning:
            if not self.spikes:
                self.since = (self._points or self._before)[-1].tokens_seen
            self.spikes.append(point)
        else:
            self.spikes = []
            warning = self._plateau(point) if len(self._points) >= _PLATEAU_ROWS else ""
        oldest = point.tokens_seen - self.run.watch.window_tokens
        if math.isfinite(point.loss) and math.isfinite(point.log_grad_norm):
            self._points = [other for other in [*self._points, point] if other.tokens_seen >= oldest]
        return warning

    def _spike(self, point: Observation) -> str:
        """Return a warning if a row lies far above the earlier ones."""
        values = f"spike: loss {point.loss:.3f}, log gradient norm {point.log_grad_norm:.2f}"
        if not (math.isfinite(point.loss) and math.isfinite(point.log_grad_norm)):
            return values
        if len(self._points) < WATCHED_ROWS:
            earlier = [*self._before, *self._points][-WATCHED_ROWS:]
            loss, gradient = median(other.loss for other in earlier), median(other.log_grad_norm for other in earlier)
            far = point.loss > _FIRST_LOSS * loss or point.log_grad_norm > gradient + _FIRST_LOG_GRAD_NORM
            return f"{values}, after medians of {loss:.3f} and {gradient:.2f}" if far else ""
        loss = z_score(point.loss, [other.loss for other in self._points])
        gradient = z_score(point.log_grad_norm, [other.log_grad_norm for other in self._points])
        if max(loss, gradient) <= self.run.watch.z_threshold:
            return ""
        return f"{values}: {loss:.1f} and {gradient:.1f} deviations above their medians"

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
        self._series: dict[str, Series] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the series from the rows that were written before."""
        if trainer.is_global_zero:
            for row in self.writer.metrics.read():
                if not _is_of_skipped_steps(row):
                    self._of(row["objective"]).update(row["phase"], _observation(row))
            self._note_trouble(cast(Pretraining, pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the step, if it was skipped, and the new rows."""
        module = cast(Pretraining, pl_module)
        if not trainer.is_global_zero:
            return
        if module.skipped_steps:
            log.warning("step %d: skipped, because %s", module.step, module.skip_reason)
        if module.skipped_steps >= self.run.watch.max_skipped_steps:
            skipped = f"{module.skipped_steps} steps in a row were skipped (watch.max_skipped_steps)"
            module.abort_reason = module.abort_reason or f"{skipped}: {self._advice(module, module.skipped_since)}"
        if self.run.watch.action != "off":
            self._judge(module)
        self._note_trouble(module)

    def _judge(self, module: Pretraining) -> None:
        """Judge the rows of the step, if there are new ones."""
        for row in self.writer.latest_rows:
            if row["step"] != module.step or _is_of_skipped_steps(row):
                continue
            series = self._of(row["objective"])
            warning = series.update(row["phase"], _observation(row))
            if warning:
                log.warning("step %d: %s", module.step, warning)
            if self.run.watch.action == "stop" and len(series.spikes) >= self.run.watch.patience:
                module.abort_reason = self._advice(module, series.since)

    def _note_trouble(self, module: Pretraining) -> None:
        """Tell the module since when it has been unstable."""
        since = [series.since for series in self._series.values() if series.spikes]
        since += [module.skipped_since] if module.skipped_steps else []
        module.unstable_since = min(since, default=None)

    def _of(self, objective: str) -> Series:
        """Return the series of an objective."""
        choices = self.run.backbone["vocab_size"] if objective in OF_TEXT else CHOICES
        return self._series.setdefault(objective, Series(self.run, math.log(choices)))

    def _advice(self, module: Pretraining, first: int) -> str:
        """Return what to do about a run that has been unstable since a position."""
        last = last_until(Path(module.run.run_dir), first)
        if last is None:
            return f"unstable since {first:,} tokens, and no checkpoint is older; start again with a lower learning rate"
        phase, general = module.last_spec.phase, self.run.optim["lr"]
        own = self.run.phases[phase].lr
        slower = f"optim.lr={general / 2:g}" if own == general else f"phases.{phase}.lr={own / 2:g}"
        return (
            f"unstable since {first:,} tokens; go back to {last} under another learning rate, or past data that hurt: "
            f"python -m modernenc.resume {shlex.quote(str(last))} --rollback --skip-tokens "
            f"{module.tokens_seen - int(tokens_seen(last))} {slower}"
        )


def _is_of_skipped_steps(row: dict[str, Any]) -> bool:
    """Return whether all steps of a row were skipped, which was said of each."""
    return bool(int(row["skipped"])) and math.isnan(float(row["loss"]))


def _observation(row: dict[str, Any]) -> Observation:
    return Observation(int(row["tokens_seen"]), float(row["loss"]), math.log(max(float(row["grad_norm"]), 1e-12)))
