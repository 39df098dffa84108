"""Show progress: a bar on a terminal, else a log line every half minute."""

import logging
import time
from typing import Any, cast

import lightning.pytorch as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from modernenc.curriculum import MASKED_LM, Curriculum
from modernenc.training.module import Pretraining
from modernenc.training.recorder import MetricsWriter, ValidationWriter

log = logging.getLogger(__name__)

_LINE_EVERY_S = 30
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
"""Sizes of numbers of tokens, largest first, with the letter for each."""


class TokenProgress(L.Callback):
    """Shows the phase, tokens, loss, speed and the time left."""

    def __init__(self, curriculum: Curriculum, writer: MetricsWriter, validation: ValidationWriter) -> None:
        self.curriculum = curriculum
        self.writer = writer
        self.validation = validation
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._started = self._last_line = time.monotonic()
        self._tokens_at_start = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar, if there is a terminal."""
        self._started = self._last_line = time.monotonic()
        self._tokens_at_start = cast(Pretraining, pl_module).tokens_seen
        if trainer.is_global_zero and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(), TextColumn("elapsed"), console=self._console,
            )  # fmt: skip
            self._bar.add_task("", total=self.curriculum.total_steps, text="", completed=cast(Pretraining, pl_module).step)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar, or log a line if one is due: every 30 seconds, and at the end of a phase."""
        module = cast(Pretraining, pl_module)
        phase = module.last_spec.phase
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=module.step, description=phase, text=self._text(module))
        due = self._bar is None and time.monotonic() - self._last_line > _LINE_EVERY_S
        if trainer.is_global_zero and (due or module.finished_phase):
            self._last_line = time.monotonic()
            line = f"{phase} step {module.step}/{self.curriculum.total_steps} {self._text(module)}"
            if self._bar is None:
                log.info(line)
            else:
                self._bar.console.print(line, markup=False)  # stays above the bar

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the bar from the terminal."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the bar from the terminal."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _text(self, module: Pretraining) -> str:
        rows = self.writer.latest_rows
        speed = (module.tokens_seen - self._tokens_at_start) / (time.monotonic() - self._started)
        left = round((self.curriculum.total_tokens - module.tokens_seen) / speed)
        parts = [_amounts(module.tokens_seen, self.curriculum.total_tokens)]
        for row in rows:
            parts.append(f"{'' if row['objective'] == MASKED_LM else row['objective'] + ' '}loss {row['loss']:.3f}")
        if rows:
            parts.append(f"{rows[0]['tokens_per_s']:,.0f} tokens/s")
        if self.validation.last_loss is not None:
            parts.append(f"validation {self.validation.last_loss:.3f}")
        return "  ".join([*parts, f"{left / 3600:.0f} h left" if left > 36000 else f"{left // 60:.0f}:{left % 60:02.0f} left"])


def _amounts(tokens: int, total: int) -> str:
    """Return how many of all tokens were seen, both in the unit that suits all of them."""
    size, letter = next(((size, letter) for size, letter in _UNITS if total >= size), (1, ""))
    return f"{tokens / size:.2f}/{total / size:.2f}{letter} tokens" if letter else f"{tokens}/{total} tokens"
