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
import matplotlib
import torch
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments, set_seed

from modernenc.bench import output
from modernenc.bench.batches import load_steps
from modernenc.bench.peers import check_peer, new_transformers_model
from modernenc.bench.settings import Bench, make_run
from modernenc.config import Run
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.evaluation.validation import Score, Validator
from modernenc.hugging_face import converter_of
from modernenc.hugging_face.tokenizer import pretrained_tokenizer
from modernenc.model.build import build_objectives
from modernenc.objectives import Objectives
from modernenc.planning.checks import check_run
from modernenc.run_folder.create import create
from modernenc.run_folder.lineage import Event
from modernenc.training.fit import fit
from modernenc.training.recorder import MetricsWriter

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
    """The losses of one training over time."""

    name: str
    optimizer: str
    lr: float
    seconds: list[float] = field(default_factory=list)
    """Training time up to each validation."""
    losses: list[float] = field(default_factory=list)
    """Validation losses in nats, with 15 % masked."""

    def seconds_to(self, loss: float) -> float | None:
        """Return the training time to the first validation at or below a loss."""
        return next((seconds for seconds, reached in zip(self.seconds, self.losses, strict=True) if reached <= loss), None)


class Clock:
    """Record validations with the training time so far, which excludes the validations themselves."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self._start = time.perf_counter()

    def validate(self, loss: Callable[[], float]) -> None:
        """Stop the clock, compute a loss, and go on."""
        now = time.perf_counter()
        self.training.seconds.append(now - self._start)
        self.training.losses.append(loss())
        self._start += time.perf_counter() - now


def measure(bench: Bench, folder: Path) -> None:
    """Train all, one after the other, and write a table, JSON and a plot."""
    if not find_spec("accelerate"):
        raise ValueError("parts=time_to_loss: transformers' Trainer needs accelerate; pip install 'modernenc[bench]'")
    console = Console()
    for backbone in bench.backbones:
        documents = make_run(bench, backbone, WHOLE_DOCUMENT)
        check_peer(backbone, documents)
        rows = make_run(bench, backbone, ROW)
        rows.validation.tokens_per_source = bench.validation_tokens
        runs = {optimizer: our_run(bench, backbone, optimizer) for optimizer in bench.optimizers}
        theirs = [
            train_alone(console, _train_theirs, documents, rows, lr, int(bench.trainer_tokens)) for lr in bench.trainer_lrs
        ]
        best = min(theirs, key=lambda training: training.losses[-1])
        ours = [train_alone(console, _train_ours, run, rows, optimizer) for optimizer, run in runs.items()]
        written = {"backbone": backbone, "best": asdict(best), "trainings": [asdict(one) for one in [*theirs, *ours]]}
        table = table_of(backbone, [*theirs, *ours], best)
        output.write(folder, f"time_to_loss_{backbone}", table, written)
        draw(theirs, ours, best, folder / f"time_to_loss_{backbone}.png")
        console.print(table)


def train_alone(console: Console, train: Callable[..., Training], *arguments: Any) -> Training:
    """Train in a process of its own, and print the final loss."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        training = pool.submit(train, *arguments).result()
    console.print(
        f"{training.name}, {training.optimizer} {training.lr:g}: {training.losses[-1]:.3f} after {training.seconds[-1]:,.0f} s"
    )
    return training


def our_run(bench: Bench, backbone: str, optimizer: str) -> Run:
    """Return our run: short rows at a constant learning rate, then long rows while it decays."""
    run = make_run(bench, backbone, ROW, optimizer)
    settings = dict(bench.optimizers[optimizer])
    tokens = settings.pop("share") * bench.trainer_tokens
    run.optim |= settings
    phase = run.phases["decay"]
    phase.lr, phase.batch_rows, phase.tokens = run.optim["lr"], LONG_ROWS, round(DECAY * tokens)
    stable = replace(
        phase, seq_len=SHORT, batch_rows=SHORT_ROWS, lr_curve="constant", warmup_tokens=round(WARMUP * tokens),
        tokens=round((1 - DECAY) * tokens),
    )  # fmt: skip
    run.phases = {"stable": stable, "decay": phase}
    run.validation.every_tokens = tokens // POINTS
    run.checkpoint.every_minutes = 0
    # Many lanes with a buffer each: a step from a single one would hold few documents, and learn less.
    run.data.lanes, run.data.buffer_rows = bench.lanes, BUFFER_ROWS
    return run


class ClockedValidator(Validator):
    """Validate as the Trainer is validated, with the clock stopped."""

    clock: Clock

    def scores(self, objectives: Objectives, phase: str) -> list[Score]:
        scores: list[Score] = []

        def loss() -> float:
            scores.extend(self.scores_at_reference(objectives.masked_lm))
            return scores[-1].loss

        self.clock.validate(loss)
        objectives.train()
        return scores


class UseValidator(L.Callback):
    """Have a run's recorder use another validator."""

    def __init__(self, validator: Validator) -> None:
        self.validator = validator

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (recorder,) = (callback for callback in cast(Any, trainer).callbacks if isinstance(callback, MetricsWriter))
        recorder.validator = self.validator


def _train_ours(run: Run, rows: Run, optimizer: str) -> Training:
    training = Training("modernenc", optimizer, run.optim["lr"])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run.run_dir = f"{folder}/run"
        curriculum, corpus = check_run(run)
        create(run, "")
        validator = ClockedValidator(rows, Curriculum.of(rows), corpus)
        validator.clock = Clock(training)
        fit(run, curriculum, corpus, "", None, Event("start"), [UseValidator(validator)])
    return training


def _train_theirs(documents: Run, rows: Run, lr: float, tokens: int) -> Training:
    corpus = Corpus.of(rows.data)
    validator = Validator(rows, Curriculum.of(rows), corpus)
    ours = build_objectives(rows).masked_lm
    set_seed(rows.seed)
    model = new_transformers_model(ours)
    training = Training("HF Trainer", "adamw", lr)
    steps = tokens // (ROW * ROWS)
    is_half = rows.trainer.precision == "bf16-mixed"

    class Validate(TrainerCallback):
        """Validate our model with the Trainer's weights."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % max(1, steps // POINTS) == 0 or state.global_step == steps:
                clock.validate(self._loss)

        def _loss(self) -> float:
            weights = converter_of(ours.backbone).from_hugging_face(model.state_dict())
            ours.to(model.device).load_state_dict(weights)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=is_half):
                return validator.scores_at_reference(ours)[-1].loss

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=lr, seed=rows.seed, report_to=[],
            bf16=is_half, use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(pretrained_tokenizer(corpus, ROW), mlm_probability=0.15)
        trainer = Trainer(model, arguments, collator, list(rows_end_to_end(documents, tokens)), callbacks=[Validate()])
        clock = Clock(training)
        trainer.train()
    return training


def rows_end_to_end(documents: Run, tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield rows of unmasked documents laid end to end, until they hold `tokens` tokens."""
    documents.phases["decay"].tokens = 2.0 * tokens  # capacity, of which padding takes a part
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


def table_of(backbone: str, trainings: list[Training], best: Training) -> Table:
    """Return a table with a row for each training; `best` is the Trainer's best, whose final loss is the target."""
    target = best.losses[-1]
    columns = ("", "lr", "ends at", "after s", "reached at", "of the best")
    table = output.new_table(f"{backbone}: seconds to {target:.3f} nat", columns)
    for training in trainings:
        reached = training.seconds_to(target)
        table.add_row(
            f"{training.name}, {training.optimizer}", f"{training.lr:g}", f"{training.losses[-1]:.3f}",
            f"{training.seconds[-1]:,.0f}", f"{reached:,.0f}" if reached else "never",
            f"{reached / best.seconds[-1]:.2f}" if reached else "",
        )  # fmt: skip
    return table


def draw(theirs: list[Training], ours: list[Training], best: Training, path: Path) -> None:
    """Draw loss against training time."""
    matplotlib.use("agg")
    figure, axis = pyplot.subplots(figsize=(7.5, 4.2), constrained_layout=True)
    for place, training in enumerate([*theirs, *ours]):
        style: dict[str, Any] = {"linewidth": 2.2} if training in ours else {"linewidth": 1, "linestyle": "--"}
        label = f"{training.name}, {training.optimizer}, {training.lr:g}"
        minutes = [seconds / 60 for seconds in training.seconds]
        axis.plot(minutes, training.losses, color=f"C{place}", marker="o", markersize=2.5, label=label, **style)
    axis.axhline(best.losses[-1], color="#666666", linewidth=0.8)
    axis.set_xlabel("minutes of training")
    axis.set_ylabel("validation loss, nats, 15 % masked")
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
