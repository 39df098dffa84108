"""Compare the minutes to a validation loss with transformers' Trainer: same text, tokenizer, model size and machine.

The Trainer does what its documentation shows for masked LM: documents end to end in rows of 512, 15 % masked, AdamW with its
defaults, a learning rate that falls linearly to 0, weights as transformers initialises them, with our standard deviation. Of
several learning rates the best counts. Ours has a curriculum: the decoder's bias starts from token frequencies, short rows of
many documents in smaller steps, then rows as long as the Trainer's while the learning rate decays. All are validated on the
same held-out rows of that length with the same masks, and validation does not count as training time.
"""

import contextlib
import io
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments, set_seed

from modernenc.bench.loop import train_silently
from modernenc.bench.ours import load_steps
from modernenc.bench.output import Output
from modernenc.bench.peers import check_peer, new_transformers_model
from modernenc.bench.settings import Bench, make_run
from modernenc.config import Run
from modernenc.data.blocks import Corpus
from modernenc.evaluation.validation import Score, Validator
from modernenc.hugging_face import converter_of
from modernenc.hugging_face.tokenizer import pretrained_tokenizer
from modernenc.model.build import build_objectives
from modernenc.objectives import Objectives
from modernenc.training.recorder import ValidationWriter

ROW, ROWS = 512, 4
"""Row length of the Trainer in tokens, and its rows per step."""
SHORT, SHORT_ROWS, LONG_ROWS, BUFFER_ROWS = 128, 8, 2, 64
"""Ours: length of the first phase's rows, rows per step in it and in the last phase, and rows of a packing buffer."""
WHOLE_DOCUMENT = 8_192
"""Tokens to which the Trainer's documents are cut before they are laid end to end."""
POINTS = 24
"""Approximate number of validations of a training."""
WARMUP, DECAY = 0.05, 0.4
"""Fractions of our tokens."""


@dataclass
class Training:
    """The losses of one training over time, which begins when this is created."""

    name: str
    optimizer: str
    lr: float
    seconds: list[float] = field(default_factory=list)
    """Training time up to each validation, which excludes the validations themselves."""
    losses: list[float] = field(default_factory=list)
    """Validation losses in nats, with 15 % masked."""
    started: float = field(default_factory=time.perf_counter)
    """When the training began, later by the time of all validations so far."""

    def validate(self, loss: Callable[[], float]) -> None:
        """Stop the clock, compute a loss, and go on."""
        now = time.perf_counter()
        self.seconds.append(now - self.started)
        self.losses.append(loss())
        self.started += time.perf_counter() - now

    def seconds_to(self, loss: float) -> float | None:
        """Return the training time to the first validation at or below a loss."""
        return next((seconds for seconds, reached in zip(self.seconds, self.losses, strict=True) if reached <= loss), None)

    def __str__(self) -> str:
        """Return what distinguishes it from the others."""
        return f"{self.name}, {self.optimizer} {self.lr:g}"


def measure(bench: Bench, folder: Path) -> Output:
    """Train with every backbone by the Trainer at each learning rate and by ours with each optimizer, one after the other."""
    if not find_spec("accelerate"):
        raise ValueError("parts=time_to_loss: transformers' Trainer needs accelerate; pip install 'modernenc[bench]'")
    columns = ("ends at", "after s", "reached at", "of the best")
    output = Output(folder, "time_to_loss", "seconds to the loss where the Trainer ends at its best learning rate", *columns)
    for backbone in bench.backbones:
        documents = make_run(bench, backbone, WHOLE_DOCUMENT, changes={"phases.decay.tokens": 2 * bench.trainer_tokens})
        check_peer(backbone, documents)
        rows = make_run(bench, backbone, ROW, changes={"validation.tokens_per_source": bench.validation_tokens})
        tokens = int(bench.trainer_tokens)
        theirs = [train_alone(_train_theirs, documents, rows, lr, tokens) for lr in bench.trainer_lrs]
        ours = [train_alone(_train_ours, our_run(bench, backbone, name), rows, name) for name in bench.optimizers]
        best = min(theirs, key=lambda training: training.losses[-1])
        output.table.add_row(f"{backbone} to {best.losses[-1]:.3f} nat")
        for training in [*theirs, *ours]:
            end, reached = training.seconds[-1], training.seconds_to(best.losses[-1])
            times = (f"{reached:,.0f}", f"{reached / best.seconds[-1]:.2f}") if reached else ("never", "")
            output.table.add_row(f"  {training}", f"{training.losses[-1]:.3f}", f"{end:,.0f}", *times)
        output.add(backbone=backbone, best=asdict(best), trainings=[asdict(one) for one in [*theirs, *ours]])
    return output


def train_alone(train: Callable[..., Training], *arguments: Any) -> Training:
    """Train in a process of its own, and print the final loss."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        training = pool.submit(train, *arguments).result()
    print(f"{training}: {training.losses[-1]:.3f} after {training.seconds[-1]:,.0f} s")
    return training


def our_run(bench: Bench, backbone: str, optimizer: str) -> Run:
    """Return our run: short rows at a constant learning rate, then long rows while it decays."""
    settings = dict(bench.optimizers[optimizer])
    tokens = settings.pop("share") * bench.trainer_tokens
    changes = {
        **{f"optim.{key}": value for key, value in settings.items()},
        "phases.decay.batch_rows": LONG_ROWS, "phases.decay.tokens": round(DECAY * tokens),
        "validation.every_tokens": tokens // POINTS, "checkpoint.every_minutes": 0,
        # Many lanes with a buffer each: a step from a single one would hold few documents, and learn less.
        "data.lanes": bench.lanes, "data.buffer_rows": BUFFER_ROWS,
    }  # fmt: skip
    run = make_run(bench, backbone, ROW, optimizer, changes)
    stable = replace(
        run.phases["decay"], seq_len=SHORT, batch_rows=SHORT_ROWS, lr_curve="constant", warmup_tokens=round(WARMUP * tokens),
        tokens=round((1 - DECAY) * tokens),
    )  # fmt: skip
    return replace(run, phases={"stable": stable, **run.phases})


class ClockedValidator(Validator, L.Callback):
    """Validates a run as the Trainer is validated, with the clock stopped, in place of the run's own validator."""

    training: Training

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (writer,) = (callback for callback in cast(Any, trainer).callbacks if isinstance(callback, ValidationWriter))
        writer.validator = self

    def scores(self, objectives: Objectives, phase: str) -> list[Score]:
        scores: list[Score] = []

        def loss() -> float:
            scores.extend(self.scores_at_reference(objectives.masked_lm))
            return scores[-1].loss

        self.training.validate(loss)
        objectives.train()
        return scores


def _train_ours(run: Run, rows: Run, optimizer: str) -> Training:
    validator = ClockedValidator(rows, Corpus.of(rows.data))
    validator.training = Training("modernenc", optimizer, run.optim["lr"])
    with tempfile.TemporaryDirectory() as folder:
        train_silently(replace(run, run_dir=f"{folder}/run"), validator)
    return validator.training


def _train_theirs(documents: Run, rows: Run, lr: float, tokens: int) -> Training:
    corpus = Corpus.of(rows.data)
    validator = Validator(rows, corpus)
    ours = build_objectives(rows).masked_lm
    set_seed(rows.seed)
    model = new_transformers_model(ours)
    steps = tokens // (ROW * ROWS)

    class Validate(TrainerCallback):
        """Validates our model with the Trainer's weights."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % max(1, steps // POINTS) == 0 or state.global_step == steps:
                training.validate(self._loss)

        def _loss(self) -> float:
            weights = converter_of(ours.backbone).from_hugging_face(model.state_dict())
            ours.to(model.device).load_state_dict(weights)
            with torch.autocast(model.device.type, torch.bfloat16):
                return validator.scores_at_reference(ours)[-1].loss

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=lr, seed=rows.seed, report_to=[],
            bf16=True, use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(pretrained_tokenizer(corpus, ROW), mlm_probability=0.15)
        rows_of_text: Any = list(rows_end_to_end(documents, tokens))
        trainer = Trainer(model, arguments, collator, rows_of_text, callbacks=[Validate()])
        training = Training("HF Trainer", "adamw", lr)
        trainer.train()
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
