"""Write metrics and validation results after a step."""

import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L

from modernenc.config import Run
from modernenc.curriculum import MASKED_LM
from modernenc.evaluation.validation import Validator
from modernenc.model.build import set_attributes
from modernenc.run_folder.checkpoints import FOLDER, name_at_end, name_at_step
from modernenc.run_folder.tables import ALL, Table
from modernenc.training.module import Pretraining

log = logging.getLogger(__name__)


_SOON = 0.1
"""Fraction of `validation.every_tokens` before the end of a phase within which only the end is validated."""
_USELESS = 1.5
"""Validation losses this many times as high as that of a model that knows nothing are warned of."""


class MetricsWriter(L.Callback):
    """Writes `metrics.csv`, and passes the same metrics to the loggers."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.metrics = Table(Path(run.run_dir) / "metrics.csv")
        self.evaluations = Table(Path(run.run_dir) / "evaluations.csv")
        self._logged_evaluations = 0
        self.latest_rows: list[dict[str, Any]] = []
        """The newest rows of training metrics, one for each objective."""
        self._since = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop the rows of steps that this run will take again."""
        module = cast(Pretraining, pl_module)
        if trainer.is_global_zero:
            self.metrics.cut_after(module.step)
            self.evaluations.cut_after(module.step)
            self._logged_evaluations = len(self.evaluations.read())
            self._check_complete(module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the metrics since the last row when they are due."""
        module = cast(Pretraining, pl_module)
        if module.step % self.run.logger.every_steps == 0 or module.finished_phase:
            self._record(trainer, module)
            self._log_evaluations(trainer, module)

    def _log_evaluations(self, trainer: L.Trainer, module: Pretraining) -> None:
        """Pass scores that another process has found meanwhile to the loggers, each with the position that it is of."""
        if not trainer.loggers or not trainer.is_global_zero:
            return
        rows = self.evaluations.read()
        for row in rows[self._logged_evaluations :]:
            name = f"evaluation/{row['suite']}/{row['task']}"
            log_numbers(trainer, module.step, {name: float(row["score"]), f"{name}/at_tokens": int(row["tokens_seen"])})
        self._logged_evaluations = len(rows)

    def _check_complete(self, module: Pretraining) -> None:
        """Warn of rows that were written before a checkpoint and are not there: a machine that dies may lose them."""
        rows, every = self.metrics.read(), self.run.logger.every_steps
        last, expected = int(rows[-1]["step"]) if rows else 0, module.step - module.step % every
        if last < expected and not (self.run.branch_from and not rows):
            log.warning("%s has lost the rows of steps %d to %d", self.metrics.path, last + 1, expected)

    def leave_out(self, seconds: float) -> None:
        """Leave out of the speed of training what was no training."""
        self._since += seconds

    def _record(self, trainer: L.Trainer, module: Pretraining) -> None:
        by_objective = module.flush_metrics()
        losses = [float(metrics.loss) for metrics in by_objective.values()]
        tokens = sum(metrics.tokens for metrics in by_objective.values())
        *losses, tokens = module.sum_over_ranks([*losses, float(tokens)]).tolist()
        seconds = time.monotonic() - self._since
        self.latest_rows = []
        for (objective, metrics), loss in zip(by_objective.items(), losses, strict=True):
            spec = metrics.spec
            row = {
                "step": module.step,
                "tokens_seen": module.tokens_seen,
                "phase": spec.phase,
                "objective": objective,
                "loss": loss / metrics.targets if metrics.targets else math.nan,  # all of these steps were skipped
                "grad_norm": float(metrics.grad_norm),
                "lr": spec.lr,
                "weight_decay": spec.weight_decay,
                "batch_rows": spec.batch_rows,
                "seq_len": spec.seq_len,
                "mask_ratio": spec.mask_ratio,
                "tokens_per_s": tokens / seconds,
                "seconds": module.seconds,
                "skipped": metrics.skipped,
            }
            if trainer.is_global_zero:
                self.metrics.append(row)
            log_numbers(trainer, module.step, row if objective == MASKED_LM else {f"{objective}/loss": row["loss"]})
            self.latest_rows.append(row)
        self._since = time.monotonic()


class ValidationWriter(L.Callback):
    """Validates after the checkpoint of a step was taken, writes `validation.csv`, and passes the scores to the loggers."""

    def __init__(self, run: Run, validator: Validator, writer: MetricsWriter) -> None:
        self.run = run
        self.validator = validator
        self.writer = writer
        self.validation = Table(Path(run.run_dir) / "validation.csv")
        self.last_loss: float | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop the rows of steps that this run will take again."""
        if trainer.is_global_zero:
            self.validation.cut_after(cast(Pretraining, pl_module).step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate weights that were given, before they change, or a step that was saved before the process died."""
        module = cast(Pretraining, pl_module)
        given = bool(self.run.init.source) and not module.step
        missing = (given or self._is_due(module)) and is_missing(module.run, module.last_spec.phase, module.step)
        if trainer.strategy.broadcast(missing):  # the first rank decides
            set_attributes(module.objectives.backbone, module.last_spec)
            self._validate(trainer, module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Validate when it is due."""
        module = cast(Pretraining, pl_module)
        if self._is_due(module):
            self._validate(trainer, module)

    def _is_due(self, module: Pretraining) -> bool:
        """Return whether validation follows the last step: one that the phase's own is about to repeat does not."""
        every = self.run.validation.every_tokens
        left = module.curriculum.end_of(module.last_spec.phase) - module.tokens_seen
        return bool(module.finished_phase) or (module.crossed(every) and left > _SOON * every)

    def _validate(self, trainer: L.Trainer, module: Pretraining) -> None:
        started, phase = time.monotonic(), module.last_spec.phase
        with trainer.precision_plugin.forward_context():
            scores = self.validator.scores(module.objectives, phase)
        at = {"step": module.step, "tokens_seen": module.tokens_seen, "phase": phase}
        if trainer.is_global_zero:
            self.validation.append(*({**at, **asdict(score)} for score in scores))
        for score in scores:
            if score.source == ALL:
                log_numbers(trainer, module.step, {f"validation/{score.seq_len}/{score.mask_ratio}": score.loss})
            elif score.source in self.run.tasks:
                log_numbers(trainer, module.step, {f"validation/{score.source}/accuracy": score.accuracy})
        self.last_loss = next(score.loss for score in scores if score.source == ALL)
        blind = math.log(self.run.backbone["vocab_size"])
        if not self.last_loss <= _USELESS * blind:
            log.warning(
                "validation loss %.3f: a model that knows nothing has %.3f; this one is of no use", self.last_loss, blind
            )
        self.writer.leave_out(time.monotonic() - started)


def is_missing(run: Run, phase: str, step: int) -> bool:
    """Return whether a step after which validation is due was saved, or is the start, and its scores were not written."""
    run_dir = Path(run.run_dir)
    saved = not step or any((run_dir / FOLDER / f"{name}.ckpt").exists() for name in (name_at_end(phase), name_at_step(step)))
    return saved and all(int(row["step"]) != step for row in Table(run_dir / "validation.csv").read())


def log_numbers(trainer: L.Trainer, step: int, values: dict[str, Any]) -> None:
    """Pass the numbers among some values to the loggers."""
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=step)
