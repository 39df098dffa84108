"""What a run writes after a step: training figures, validation, checkpoints."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L

from modernenc.checkpoints import WHOLE, Share, Writer
from modernenc.config import Run
from modernenc.curriculum import MASKED_LM
from modernenc.metrics import ALL, Table
from modernenc.trainer import Pretraining
from modernenc.validation import Validator


class Recorder(L.Callback):
    """`metrics.csv`, `validation.csv`, and the same figures to the loggers."""

    def __init__(self, run: Run, validator: Validator) -> None:
        self.run = run
        self.validator = validator
        self.metrics = Table(Path(run.run_dir) / "metrics.csv")
        self.validation = Table(Path(run.run_dir) / "validation.csv")
        self.last: list[dict[str, Any]] = []
        """The newest training figures, a row for each objective."""
        self.last_validation_loss: float | None = None
        self._since = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget rows of steps that will be made again."""
        module = cast(Pretraining, pl_module)
        for table in (self.metrics, self.validation) if trainer.is_global_zero else ():
            table.cut_after(module.step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step, and validate when it is due."""
        module = cast(Pretraining, pl_module)
        phase = module.finished_phase
        if module.step % self.run.logger.every_steps == 0 or phase:
            self._record(trainer, module)
        if phase or module.crossed(self.run.validation.every_tokens):
            started = time.monotonic()
            self._validate(trainer, module)
            self._since += time.monotonic() - started  # speed is that of training

    def _record(self, trainer: L.Trainer, module: Pretraining) -> None:
        recorded = module.recorded()
        mine = [float(since.loss) for since in recorded.values()]
        *losses, tokens = module.sum_over_ranks([*mine, float(sum(since.tokens for since in recorded.values()))])
        seconds = time.monotonic() - self._since
        self.last = []
        for (objective, since), loss in zip(recorded.items(), losses, strict=True):
            point = since.point
            row = {
                "step": module.step,
                "tokens_seen": module.tokens_seen,
                "phase": point.phase,
                "objective": objective,
                "loss": loss / max(1, since.targets),
                "grad_norm": float(since.grad_norm),
                "lr": point.lr,
                "weight_decay": point.weight_decay,
                "batch_rows": point.batch_rows,
                "seq_len": point.seq_len,
                "mask_ratio": point.mask_ratio,
                "tokens_per_s": tokens / seconds,
                "seconds": module.seconds,
            }
            if trainer.is_global_zero:
                self.metrics.append(row)
            self._log(trainer, module, row if objective == MASKED_LM else {f"{objective}/loss": row["loss"]})
            self.last.append(row)
        self._since = time.monotonic()

    def _validate(self, trainer: L.Trainer, module: Pretraining) -> None:
        phase = module.last_point.phase
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

    def _log(self, trainer: L.Trainer, module: Pretraining, figures: dict[str, Any]) -> None:
        numbers = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=module.step)


class Checkpointing(L.Callback):
    """Save at each phase boundary, between them by tokens and by time, and when asked to stop; always after a whole step."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._time_of_save = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and a writer: only since ranks met do all know the run folder."""
        self._writer = Writer(Path(self.run.run_dir), self.run.checkpoint.keep_last)
        self._time_of_save = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is due; OSError when the last one could not be written."""
        module = cast(Pretraining, pl_module)
        self._writer.check()
        phase = module.finished_phase
        if module.abandoned or not (phase or module.interrupted or self._due(trainer, module)):
            return
        shares = self.run.checkpoint.distributed and module.is_split
        content = module.snapshot(shares)
        share = WHOLE
        if shares:
            share = Share(trainer.global_rank, trainer.world_size, save=trainer.strategy.broadcast(time.time_ns()))
        if shares or trainer.is_global_zero:
            self._writer.save(content, f"end-of-{phase}" if phase else f"step-{module.step:08d}", share)
        self._time_of_save = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait until all is on disk, on all ranks: a launcher may kill the first one when another has gone."""
        self._writer.close()
        trainer.strategy.barrier()

    def _due(self, trainer: L.Trainer, module: Pretraining) -> bool:
        every_s = self.run.checkpoint.every_minutes * 60
        by_time = 0 < every_s <= time.monotonic() - self._time_of_save
        if every_s:
            by_time = bool(trainer.strategy.broadcast(by_time))  # clocks differ
        return by_time or module.crossed(self.run.checkpoint.every_tokens)
