"""Minutes to a validation loss, beside transformers' Trainer: same text, tokenizer, size of model and machine.

The Trainer does what its documentation shows for masked LM: documents one after the other in rows of 512, 15 % masked, AdamW
with its defaults, a learning rate that falls to 0 by a line, weights as transformers initialises them, with our standard
deviation; at several learning rates, of which the best counts. Ours has a curriculum: from the frequencies of tokens on, short
rows of many documents in smaller steps, then rows of the same length as theirs while the learning rate decays. All are
validated on the same held-out rows of that length with the same masks, while their clocks stand still.
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
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from modernenc.bench import output
from modernenc.bench.settings import Bench, the_run
from modernenc.bench.step import check_peer
from modernenc.config import Run

if TYPE_CHECKING:
    import torch

ROW, ROWS = 512, 4
"""Length of their rows, and how many there are in a step."""
SHORT, SHORT_ROWS, LONG_ROWS, WINDOW_ROWS = 128, 8, 2, 64
"""Length of the rows that ours begins with, how many there are in a step, how many of theirs at the end, and in a window."""
WHOLE_DOCUMENT = 8_192
"""Tokens that theirs are cut to before they are laid end to end."""
POINTS = 24
"""Validations of a training, about."""
WARMUP, DECAY = 0.05, 0.4
"""Of our tokens."""


@dataclass
class Training:
    """What one training reached when."""

    name: str
    optimizer: str
    lr: float
    seconds: list[float] = field(default_factory=list)
    """Of training alone, to each validation."""
    losses: list[float] = field(default_factory=list)
    """In nats, 15 % masked."""

    def seconds_to(self, loss: float) -> float | None:
        """To the first validation at or below a loss."""
        return next((seconds for seconds, reached in zip(self.seconds, self.losses, strict=True) if reached <= loss), None)


class Clock:
    """Writes down validations, whose time does not count."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self._start = time.perf_counter()

    def validate(self, loss: Callable[[], float]) -> None:
        """Call for a loss, and note it with the time until now."""
        now = time.perf_counter()
        self.training.seconds.append(now - self._start)
        self.training.losses.append(loss())
        self._start += time.perf_counter() - now


def measure(bench: Bench, folder: Path) -> None:
    """Train all, one after the other, and write a table, JSON and a plot."""
    if not find_spec("accelerate"):
        raise ValueError("parts=time_to_loss: transformers' Trainer needs accelerate; pip install 'modernenc[bench]'")
    console, written = Console(), []
    for backbone in bench.backbones:
        documents = the_run(bench, backbone, WHOLE_DOCUMENT)
        check_peer(backbone, documents)
        rows = the_run(bench, backbone, ROW)
        rows.validation.tokens_per_source = bench.validation_tokens
        runs = {optimizer: ours_with(bench, backbone, optimizer) for optimizer in bench.optimizers}
        theirs = [alone(console, _theirs, documents, rows, lr, int(bench.trainer_tokens)) for lr in bench.trainer_lrs]
        best = min(theirs, key=lambda training: training.losses[-1])
        ours = [alone(console, _ours, run, rows, optimizer) for optimizer, run in runs.items()]
        written.append({"backbone": backbone, "best": asdict(best), "trainings": [asdict(one) for one in [*theirs, *ours]]})
        table = table_of(backbone, theirs, ours, best)
        output.write(folder, f"time_to_loss_{backbone}", table, written[-1])
        draw(theirs, ours, best, folder / f"time_to_loss_{backbone}.png")
        console.print(table)


def alone(console: Console, train: Callable[..., Training], *arguments: Any) -> Training:
    """A training in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        training = pool.submit(train, *arguments).result()
    console.print(
        f"{training.name}, {training.optimizer} {training.lr:g}: {training.losses[-1]:.3f} after {training.seconds[-1]:,.0f} s"
    )
    return training


def ours_with(bench: Bench, backbone: str, optimizer: str) -> Run:
    """Our run: short rows at a constant learning rate, then long ones as it decays."""
    run = the_run(bench, backbone, ROW, optimizer)
    settings = dict(bench.optimizers[optimizer])
    if "share" not in settings:
        raise ValueError(f"optimizers.{optimizer}: no share; expected that of the Trainer's tokens, such as 0.65")
    tokens = settings.pop("share") * bench.trainer_tokens
    run.optim |= settings
    (phase,) = run.phases.values()
    phase.lr, phase.batch_rows, phase.tokens = run.optim["lr"], LONG_ROWS, round(DECAY * tokens)
    stable = replace(
        phase, seq_len=SHORT, batch_rows=SHORT_ROWS, lr_curve="constant", warmup_tokens=round(WARMUP * tokens),
        tokens=round((1 - DECAY) * tokens),
    )  # fmt: skip
    run.phases = {"stable": stable, "decay": phase}
    run.validation.every_tokens = tokens // POINTS
    run.checkpoint.every_minutes = 0
    # Many windows open: a step of one is of few documents, and learns less.
    run.data.lanes, run.data.window_rows = bench.lanes, WINDOW_ROWS
    return run


def _ours(run: Run, rows: Run, optimizer: str) -> Training:
    import lightning.pytorch as L

    from modernenc import fit as fitting
    from modernenc.checks import check_run
    from modernenc.curriculum import Curriculum
    from modernenc.objectives import Objectives
    from modernenc.recorder import Recorder
    from modernenc.validation import Score, Validator

    training = Training("modernenc", optimizer, run.optim["lr"])

    class Timed(L.Callback):
        """Has the clock stand still while the run validates."""

        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            (recorder,) = (callback for callback in trainer.callbacks if isinstance(callback, Recorder))  # pyright: ignore[reportAttributeAccessIssue]
            validator = Validator(rows, Curriculum.of(rows), recorder.validator.corpus)

            def scores(objectives: Objectives, phase: str) -> list[Score]:
                found = []

                def loss() -> float:
                    found.extend(validator.first_scores(objectives.masked_lm))
                    return found[-1].loss

                clock.validate(loss)
                objectives.train()
                return found

            recorder.validator.scores = scores

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run.run_dir = f"{folder}/run"
        curriculum, corpus = check_run(run)
        fitting.start(run, curriculum)
        clock = Clock(training)
        fitting.fit(run, curriculum, corpus, None, {"event": "start", "checkpoint": ""}, [Timed()])
    return training


def _theirs(documents: Run, rows: Run, lr: float, tokens: int) -> Training:
    import torch
    from transformers import (
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    from modernenc.bench.step import new_transformers_model
    from modernenc.curriculum import Curriculum
    from modernenc.data.blocks import Corpus
    from modernenc.hugging_face import converter_of
    from modernenc.hugging_face.tokenizer import pretrained_tokenizer
    from modernenc.model import build_objectives
    from modernenc.validation import Validator

    corpus = Corpus.of(rows.data)
    validator = Validator(rows, Curriculum.of(rows), corpus)
    ours = build_objectives(rows).masked_lm
    converter = converter_of(ours.backbone)
    set_seed(rows.seed)
    model = new_transformers_model(ours)
    training = Training("HF Trainer", "adamw", lr)
    steps = tokens // (ROW * ROWS)

    class Timed(TrainerCallback):
        """Validates our model with these weights."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % max(1, steps // POINTS) == 0 or state.global_step == steps:
                clock.validate(self._loss)

        def _loss(self) -> float:
            ours.to(model.device).load_state_dict(converter.from_hugging_face(model.state_dict()))
            with torch.autocast(model.device.type, torch.bfloat16, enabled=rows.trainer.precision == "bf16-mixed"):
                return validator.first_scores(ours)[-1].loss

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=lr, seed=rows.seed, report_to=[],
            bf16=rows.trainer.precision == "bf16-mixed", use_cpu=not torch.cuda.is_available(), save_strategy="no",
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model,
            arguments,
            DataCollatorForLanguageModeling(pretrained_tokenizer(corpus, ROW), mlm_probability=0.15),
            list(full_rows(documents, tokens)),
            callbacks=[Timed()],
        )
        clock = Clock(training)
        trainer.train()
    return training


def full_rows(documents: Run, tokens: int) -> Iterator[dict[str, "torch.Tensor"]]:
    """So many tokens of whole documents, one after the other, in rows of full length."""
    import torch

    from modernenc.curriculum import Curriculum
    from modernenc.data.blocks import Corpus
    from modernenc.data.loader import DataState, Steps

    (phase,) = documents.phases.values()
    phase.tokens = 2.0 * tokens  # of capacity
    left = torch.empty(0, dtype=torch.long)
    for step in Steps(documents, Curriculum.of(documents), Corpus.of(documents.data), 0, 1, DataState()):
        for batch in step.micro_batches:
            batch = batch.unpadded()
            left = torch.cat((left, batch.input_ids.index_copy(0, batch.target_positions, batch.targets)))
        whole = len(left) // ROW * ROW
        for row in left[:whole].view(-1, ROW):
            yield {"input_ids": row}
        left, tokens = left[whole:], tokens - whole
        if tokens <= 0:
            return


def table_of(backbone: str, theirs: list[Training], ours: list[Training], best: Training) -> Table:
    """A row for each training."""
    target = best.losses[-1]
    table = output.new_table(
        f"{backbone}: seconds to {target:.3f} nat", ("", "lr", "ends at", "after s", "reached at", "of the best")
    )
    for training in [*theirs, *ours]:
        reached = training.seconds_to(target)
        table.add_row(
            f"{training.name}, {training.optimizer}", f"{training.lr:g}", f"{training.losses[-1]:.3f}",
            f"{training.seconds[-1]:,.0f}", f"{reached:,.0f}" if reached else "never",
            f"{reached / best.seconds[-1]:.2f}" if reached else "",
        )  # fmt: skip
    return table


def draw(theirs: list[Training], ours: list[Training], best: Training, path: Path) -> None:
    """Loss against time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

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
