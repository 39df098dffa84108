"""One training that is timed, by transformers' Trainer or by a recipe of ours, in a process of its own.

Both get the same text and tokenizer, a model of the same shape, and the memory allocator of our runs. Both are validated on the
same held-out rows of 512 with the same masks, by the same code; validation does not count as training time. The Trainer's time
begins when its model and its rows are there, ours before the model is built: what a recipe counts in the text is its time.

The Trainer does what its documentation shows for masked LM: documents end to end in rows of 512, 15 % masked, AdamW with its
defaults, a learning rate that falls linearly to 0, weights as transformers initialises them, with our standard deviation.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments, set_seed

from modernenc.bench.loop import train_silently
from modernenc.bench.ours import load_steps, step_work
from modernenc.bench.peers import new_transformers_model
from modernenc.config import Run
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.evaluation.validation import Score, Validator
from modernenc.hugging_face import converter_of
from modernenc.hugging_face.tokenizer import pretrained_tokenizer
from modernenc.model.allocator import keep_freed_memory
from modernenc.model.build import build_objectives
from modernenc.model.export import export
from modernenc.objectives import Objectives
from modernenc.planning.estimate import flops
from modernenc.run_folder import checkpoints
from modernenc.training.module import Pretraining
from modernenc.training.recorder import ValidationWriter

ROW = 512
"""Length in tokens of the Trainer's rows, and of those that both are validated on."""
WHOLE_DOCUMENT = 8_192
"""Tokens to which the Trainer's documents are cut before they are laid end to end."""
POINTS = 24
"""Approximate number of validations of a training."""


@dataclass
class Training:
    """The losses of one training over its cost, which begins when this is created."""

    seconds: list[float] = field(default_factory=list)
    """Training time up to each validation, which excludes the validations themselves."""
    tokens: list[float] = field(default_factory=list)
    """Row capacity that was trained on."""
    flops: list[float] = field(default_factory=list)
    """FLOPs of matrix products."""
    losses: list[float] = field(default_factory=list)
    """Validation losses in nats, with 15 % masked."""
    started: float = field(default_factory=time.perf_counter)
    """When the training began, later by the time of all validations so far."""

    def validate(self, tokens: float, flops: float, loss: Callable[[], float]) -> None:
        """Stop the clock, compute a loss, and go on."""
        now = time.perf_counter()
        self.seconds.append(now - self.started)
        self.tokens.append(tokens)
        self.flops.append(flops)
        self.losses.append(loss())
        self.started += time.perf_counter() - now

    def reaches(self, loss: float) -> int | None:
        """Return the number of the first validation at or below a loss."""
        return next((number for number, reached in enumerate(self.losses) if reached <= loss), None)


class ClockedValidator(Validator, L.Callback):
    """Validates a run as the Trainer is validated, with the clock stopped, in place of the run's own validator."""

    def __init__(self, rows: Run, corpus: Corpus, run: Run) -> None:
        super().__init__(rows, corpus)
        self.curriculum = Curriculum.of(run)
        self.flops = {name: flops(run, phase, corpus) for name, phase in run.phases.items()}
        self.module: Pretraining | None = None
        self.training = Training()  # the clock runs

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (writer,) = (callback for callback in cast(Any, trainer).callbacks if isinstance(callback, ValidationWriter))
        writer.validator = self
        self.module = cast(Pretraining, pl_module)

    def scores(self, objectives: Objectives, phase: str) -> list[Score]:
        assert self.module
        tokens = self.module.tokens_seen
        spent = 0.0
        for name, each in self.flops.items():
            start, end = self.curriculum.start_of(name), self.curriculum.end_of(name)
            spent += each * max(0, min(tokens, end) - start)
        scores: list[Score] = []

        def loss() -> float:
            scores.extend(self.scores_at_reference(objectives.masked_lm))
            return scores[-1].loss

        self.training.validate(tokens, spent, loss)
        objectives.train()
        return scores


def train_ours(run: Run, rows: Run, keep: Path | None) -> Training:
    """Train a recipe of ours; `keep` is a folder to export the model to."""
    validator = ClockedValidator(rows, Corpus.of(rows.data), run)
    with tempfile.TemporaryDirectory() as folder:
        run = replace(run, run_dir=f"{folder}/run")
        train_silently(run, validator)
        if keep and (last := checkpoints.newest(Path(run.run_dir))):
            export([last], keep)
    return validator.training


def train_theirs(documents: Run, rows: Run, lr: float, batch_rows: int, tokens: int, seed: int, keep: Path | None) -> Training:
    """Train by transformers' Trainer; `keep` is a folder to save the model in."""
    keep_freed_memory()
    corpus = Corpus.of(rows.data)
    validator = Validator(rows, corpus)
    ours = build_objectives(rows).masked_lm
    set_seed(seed)
    model = new_transformers_model(ours)
    steps = tokens // (ROW * batch_rows)
    each = step_work(ours, [ROW], targets=ROW).flops / ROW  # it computes the logits of all tokens

    class Validate(TrainerCallback):
        """Validates our model with the Trainer's weights."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % max(1, steps // POINTS) == 0 or state.global_step == steps:
                trained = state.global_step * batch_rows * ROW
                training.validate(trained, each * trained, self._loss)

        def _loss(self) -> float:
            weights = converter_of(ours.backbone).from_hugging_face(model.state_dict())
            ours.to(model.device).load_state_dict(weights)
            with torch.autocast(model.device.type, torch.bfloat16):
                return validator.scores_at_reference(ours)[-1].loss

    tokenizer = pretrained_tokenizer(corpus, ROW)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=batch_rows, learning_rate=lr, seed=seed, report_to=[],
            bf16=True, use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
        rows_of_text: Any = list(rows_end_to_end(documents, tokens))
        trainer = Trainer(model, arguments, collator, rows_of_text, callbacks=[Validate()])
        training = Training()
        trainer.train()
    if keep:
        model.save_pretrained(keep)
        tokenizer.save_pretrained(keep)
    return training


def rows_end_to_end(documents: Run, tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield rows of unmasked documents laid end to end, until they hold `tokens` tokens."""
    left = torch.empty(0, dtype=torch.long)
    for step in load_steps(documents):
        for batch in (batch.unpadded() for batch in step.micro_batches):
            left = torch.cat((left, batch.input_ids.index_copy(0, batch.target_positions, batch.targets)))
        whole = len(left) // ROW * ROW
        for row in left[:whole].view(-1, ROW):
            yield {"input_ids": row}
        left, tokens = left[whole:], tokens - whole
        if tokens <= 0:
            return
