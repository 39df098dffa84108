"""Measure what the framework costs over a bare loop, and what a save costs.

A bare PyTorch loop and a whole run take turns of 100 steps, over the same batches with the same model and optimizer. Steps are
as small as the demo's, where overhead shows most. Then a run saves every ten steps: the time by which the steps during and
after a save exceed their neighbours is the cost of the save, given as a fraction of 50 steps.
"""

import contextlib
import io
import tempfile
import time
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning.pytorch as L
from rich.console import Console

from modernenc.bench import output
from modernenc.bench.settings import Bench, make_run
from modernenc.config import Run
from modernenc.planning.checks import check_run
from modernenc.planning.measure import bare_loop_step_seconds, keep_phase
from modernenc.run_folder.create import create
from modernenc.run_folder.lineage import Event
from modernenc.training.fit import fit

ROW, ROWS = 256, 8
STEPS, WARMUP, SAVE_EVERY = 100, 5, 10
SAVES = 5
"""Saves of the run that `saving_run` measures."""
STEPS_PER_SAVE = 50
"""Interval of saves that the table assumes, in steps."""


def measure(bench: Bench, folder: Path) -> None:
    """Measure every backbone, and write a table and JSON."""
    table = output.new_table(
        f"seconds a step of {ROWS * ROW:,} tokens, medians",
        ("", "bare loop", "run", "ratio", "from-to", "saving", "from-to"),
    )
    written = []
    for backbone in bench.backbones:
        run = make_run(bench, backbone, ROW, "muon")
        run.phases["decay"].batch_rows = ROWS
        _prepare(run, STEPS, ROW)
        seconds: dict[str, list[float]] = {"bare loop": [], "run": []}
        with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()):
            saving = deepcopy(run)
            saving.checkpoint.every_tokens, saving.run_dir = SAVE_EVERY * ROWS * ROW, f"{runs}/saving"
            saves = [1 + cost / STEPS_PER_SAVE for cost in save_costs(full_run(saving).step_seconds, SAVE_EVERY)]
            for number in range(bench.repetitions):
                one = deepcopy(run)
                one.checkpoint.every_tokens, one.run_dir = 0, f"{runs}/{number}"
                seconds["bare loop"].append(bare_loop_step_seconds(run, STEPS, WARMUP))
                seconds["run"].append(mean(full_run(one).step_seconds[WARMUP:]))
        ratios = [run / bare for run, bare in zip(seconds["run"], seconds["bare loop"], strict=True)]
        table.add_row(
            backbone, *(f"{median(values):.4f}" for values in seconds.values()),
            f"{median(ratios):.3f}", f"{min(ratios):.3f}-{max(ratios):.3f}",
            f"{median(saves):.3f}", f"{min(saves):.3f}-{max(saves):.3f}",
        )  # fmt: skip
        written.append({"backbone": backbone, "seconds": seconds, "ratios": ratios, "saving": saves})
        output.write(folder, "loop", table, written)
    Console().print(table)


def _prepare(run: Run, steps: int, validation_tokens: int) -> None:
    keep_phase(run, "decay", steps)
    run.data.workers = 1
    run.validation.tokens_per_source = validation_tokens
    run.checkpoint.every_minutes = 0


class StepClock(L.Callback):
    """Note when each step starts and ends, and its tokens."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.tokens: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.starts.append(time.perf_counter())
        self.tokens.append(batch.tokens)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ends.append(time.perf_counter())

    @property
    def step_seconds(self) -> list[float]:
        """Seconds from the start of each step to that of the next, so including all that the run does after a step."""
        return [after - before for before, after in pairwise(self.starts)]


def full_run(run: Run) -> StepClock:
    """Train a whole run, and return the times of its steps."""
    clock = StepClock()
    curriculum, corpus = check_run(run)
    create(run, "")
    fit(run, curriculum, corpus, "", None, Event("start"), [clock])
    return clock


def save_costs(times: list[float], every: int) -> list[float]:
    """Return the cost of each save in steps: the excess of the step that it ends and the two after it over their neighbours."""
    costs = []
    for save in range(2 * every - 1, len(times) - every, every):
        usual = median(times[save - every + 3 : save] + times[save + 3 : save + every])
        costs.append(sum(times[save : save + 3]) / usual - 3)
    return costs


def saving_run(run: Run, steps: int, scratch: str) -> dict[str, float]:
    """Train a run that saves `SAVES` times, and return by gpu.csv's columns: step time and speed far from a save, the cost of a
    save, and the time between two steps, in which the loop waits for the loader."""
    every, phase = steps // SAVES, run.phases["decay"]
    _prepare(run, steps, phase.seq_len)
    run.checkpoint.every_tokens = every * phase.batch_rows * phase.seq_len
    run.run_dir = f"{scratch}/run"
    with contextlib.redirect_stdout(io.StringIO()):
        clock = full_run(run)
    times = clock.step_seconds
    usual = [number for number in range(every, len(times)) if (number + 1) % every > 2]  # far from a save
    seconds = [times[number] for number in usual]
    return {
        "ms": 1e3 * mean(seconds), "ms_from": 1e3 * min(seconds), "ms_to": 1e3 * max(seconds), "first_s": times[0],
        "tokens_per_s": sum(clock.tokens[number] for number in usual) / sum(seconds),
        "save_s": mean(save_costs(times, every)) * mean(seconds),
        "between_ms": 1e3 * mean(clock.starts[number + 1] - clock.ends[number] for number in usual),
    }  # fmt: skip
