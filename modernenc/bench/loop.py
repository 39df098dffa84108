"""Measure what the framework costs over a bare loop, and what a save costs.

A bare PyTorch loop and a whole run take turns, over the same batches with the same model and optimizer. Steps are as small as
the demo's, where overhead shows most. The run is saved five times. What counts are its steps far from a save; the time by which
the steps during and after a save exceed their neighbours is the cost of the save, given as a fraction of 50 steps.
"""

import contextlib
import io
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning.pytorch as L

from modernenc.bench.interleave import Metrics
from modernenc.bench.output import Output, spread
from modernenc.bench.settings import Bench, make_run
from modernenc.config import Run
from modernenc.planning.checks import check_run
from modernenc.planning.measure import bare_loop_step_seconds
from modernenc.run_folder.create import create
from modernenc.run_folder.lineage import Event
from modernenc.training.fit import fit

ROW, ROWS, STEPS, WARMUP = 256, 8, 100, 5
SAVES = 5
STEPS_PER_SAVE = 50
"""Interval of saves that the table assumes, in steps."""


def measure(bench: Bench, folder: Path) -> Output:
    """Measure every backbone."""
    title = f"seconds a step of {ROWS * ROW:,} tokens, medians"
    output = Output(folder, "loop", title, "bare loop", "run", "ratio", "from-to", "saving", "from-to")
    for backbone in bench.backbones:
        bare, whole, saving = [], [], []
        for _ in range(bench.repetitions):
            with tempfile.TemporaryDirectory() as folder_of_run:
                sizes = {"phases.decay.batch_rows": ROWS, **run_settings(STEPS * ROWS * ROW, ROW, folder_of_run)}
                run = make_run(bench, backbone, ROW, "muon", sizes)
                bare.append(bare_loop_step_seconds(run, STEPS, WARMUP))
                metrics = time_run(run, STEPS)
            whole.append(metrics["ms"] / 1e3)
            saving.append(1 + metrics["save_s"] / whole[-1] / STEPS_PER_SAVE)
        ratios = [run / loop for run, loop in zip(whole, bare, strict=True)]
        seconds = (f"{median(values):.4f}" for values in (bare, whole))
        output.table.add_row(backbone, *seconds, *spread(ratios, 3), *spread(saving, 3))
        output.add(backbone=backbone, seconds={"bare loop": bare, "run": whole}, ratios=ratios, saving=saving)
    return output


def run_settings(tokens: int, length: int, folder: str) -> dict[str, Any]:
    """Return the settings by key of a run in a folder, over so many tokens in rows of `length`, which saves `SAVES` times."""
    return {
        "run_dir": f"{folder}/run",
        "phases.decay.tokens": tokens, "data.workers": 1, "validation.tokens_per_source": length,
        "checkpoint.every_tokens": tokens // SAVES, "checkpoint.every_minutes": 0,
    }  # fmt: skip


class StepClock(L.Callback):
    """Notes when each step starts and ends, and its tokens."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.tokens: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.starts.append(time.perf_counter())
        self.tokens.append(batch.tokens)

    def on_train_batch_end(self, *arguments: Any, **keywords: Any) -> None:
        self.ends.append(time.perf_counter())


def train_silently(run: Run, callback: L.Callback) -> None:
    """Train a run in its folder without printing its progress."""
    with contextlib.redirect_stdout(io.StringIO()):
        curriculum, corpus = check_run(run)
        run = create(run, "", corpus_files=corpus.small_files())
        fit(run, curriculum, corpus, "", None, Event("start"), [callback])


def time_run(run: Run, steps: int) -> Metrics:
    """Train a run of so many steps that saves `SAVES` times.

    Returns, by the columns of gpu.csv, time and speed of the steps far from a save, from the start of one to that of the next,
    the cost of a save, and the time between two steps, in which the loop waits for the loader.
    """
    clock, every = StepClock(), steps // SAVES
    train_silently(run, clock)
    times = [after - before for before, after in pairwise(clock.starts)]
    far = [number for number in range(every, len(times)) if (number + 1) % every > 2]  # from a save
    seconds = [times[number] for number in far]
    return {
        "ms": 1e3 * mean(seconds), "ms_from": 1e3 * min(seconds), "ms_to": 1e3 * max(seconds), "first_s": times[0],
        "tokens_per_s": sum(clock.tokens[number] for number in far) / sum(seconds),
        "save_s": mean(save_costs(times, every)) * mean(seconds),
        "between_ms": 1e3 * mean(clock.starts[number + 1] - clock.ends[number] for number in far),
    }  # fmt: skip


def save_costs(times: list[float], every: int) -> list[float]:
    """Return the cost of each save in steps: the excess of the step that it ends and the two after it over their neighbours."""
    costs = []
    for save in range(2 * every - 1, len(times) - every, every):
        usual = median(times[save - every + 3 : save] + times[save + 3 : save + every])
        costs.append(sum(times[save : save + 3]) / usual - 3)
    return costs
