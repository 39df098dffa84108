"""Write metrics and validation results after a step."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L

from modernenc.config import Run
from modernenc.curriculum import MASKED_LM
from modernenc.evaluation.validation import Validator
from modernenc.run_folder.tables import ALL, Table
from modernenc.training.module import Pretraining


class MetricsWriter(L.Callback):
    """Writes `metrics.csv` and `validation.csv`, and passes the same metrics to the loggers."""

    def __init__(self, run: Run, validator: Validator) -> None:
        self.run = run
        self.validator = validator
        self.metrics = Table(Path(run.run_dir) / "metrics.csv")
        self.validation = Table(Path(run.run_dir) / "validation.csv")
        self.latest_rows: list[dict[str, Any]] = []
        """The newest rows of training metrics, one for each objective."""
        self.last_validation_loss: float | None = None
        self._since = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop the rows of steps that this run will take again."""
        module = cast(Pretraining, pl_module)
        if trainer.is_global_zero:
            self.metrics.cut_after(module.step)
            self.validation.cut_after(module.step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the metrics of the step, and validate, when they are due."""
        module = cast(Pretraining, pl_module)
        phase = module.finished_phase
        if module.step % self.run.logger.every_steps == 0 or phase:
            self._record(trainer, module)
        if phase or module.crossed(self.run.validation.every_tokens):
            started = time.monotonic()
            self._validate(trainer, module)
            self._since += time.monotonic() - started  # speed is that of training

    def _record(self, trainer: L.Trainer, module: Pretraining) -> None:
        by_objective = module.flush_metrics()
        losses = [float(metrics.loss) for metrics in by_objective.values()]
        *losses, tokens = module.sum_over_ranks([*losses, float(sum(metrics.tokens for metrics in by_objective.values()))])
        seconds = time.monotonic() - self._since
        self.latest_rows = []
        for (objective, metrics), loss in zip(by_objective.items(), losses, strict=True):
            spec = metrics.spec
            row = {
                "step": module.step,
                "tokens_seen": module.tokens_seen,
                "phase": spec.phase,
                "objective": objective,
                "loss": loss / max(1, metrics.targets),
                "grad_norm": float(metrics.grad_norm),
                "lr": spec.lr,
                "weight_decay": spec.weight_decay,
                "batch_rows": spec.batch_rows,
                "seq_len": spec.seq_len,
                "mask_ratio": spec.mask_ratio,
                "tokens_per_s": tokens / seconds,
                "seconds": module.seconds,
            }
            if trainer.is_global_zero:
                self.metrics.append(row)
            self._log(trainer, module, row if objective == MASKED_LM else {f"{objective}/loss": row["loss"]})
            self.latest_rows.append(row)
        self._since = time.monotonic()

    def _validate(self, trainer: L.Trainer, module: Pretraining) -> None:
        phase = module.last_spec.phase
        with trainer.precision_plugin.forward_context():
            scores = self.validator.scores(module.objectives, phase)
        for score in scores:
            row = {"step": module.step, "tokens_seen": module.tokens_seen, "phase": phase, **asdict(score)}
            if trainer.is_global_zero:
                self.validation.append(row)
            if score.source == ALL:
                self._log(trainer, module, {f"validation/{score.seq_len}/{score.mask_ratio}": score.loss})
            elif score.source in self.run.tasks:
                self._log(trainer, module, {f"validation/{score.source}/accuracy": score.accuracy})
        self.last_validation_loss = next(score.loss for score in scores if score.source == ALL)

    def _log(self, trainer: L.Trainer, module: Pretraining, metrics: dict[str, Any]) -> None:
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=module.step)
