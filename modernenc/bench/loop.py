"""What the framework costs over a bare loop, and what a save costs.

A hundred steps at a time, in turn: a bare PyTorch loop over the same batches with the same model and optimizer, and a whole
run. Steps are as small as the demo's, where overhead shows most. Then a run that saves every ten steps: what the steps during
and after a save take beyond their neighbours is the cost of the save, told as a share of 50 steps.
"""

import contextlib
import io
import tempfile
import time
from copy import deepcopy
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console

from modernenc.bench import output
from modernenc.bench.settings import Bench, the_run
from modernenc.config import Run
from modernenc.curriculum import cycle_tokens, objectives_of, reads_text

ROW, ROWS = 256, 8
STEPS, WARMUP, SAVE_EVERY = 100, 5, 10
SAVES = 5
"""Of a run that is told of by itself."""
SHARE_OF = 50


def measure(bench: Bench, folder: Path) -> None:
    """Measure every backbone, and write a table and JSON."""
    table = output.new_table(
        f"seconds a step of {ROWS * ROW:,} tokens, medians",
        ("", "bare loop", "run", "ratio", "from-to", "saving", "from-to"),
    )
    written = []
    for backbone in bench.backbones:
        run = the_run(bench, backbone, ROW, "muon")
        (phase,) = run.phases.values()
        phase.batch_rows = ROWS
        only(run, "decay", STEPS)
        run.data.workers = 1
        run.validation.tokens_per_source = ROW
        run.checkpoint.every_minutes = 0
        seconds: dict[str, list[float]] = {"bare loop": [], "run": []}
        with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()):
            saving = deepcopy(run)
            saving.checkpoint.every_tokens, saving.run_dir = SAVE_EVERY * ROWS * ROW, f"{runs}/saving"
            saves = [1 + cost / SHARE_OF for cost in cost_of_saves(whole(saving))]
            for number in range(bench.repetitions):
                one = deepcopy(run)
                one.checkpoint.every_tokens, one.run_dir = 0, f"{runs}/{number}"
                seconds["bare loop"].append(bare(run))
                times = whole(one)[WARMUP:]
                seconds["run"].append(sum(times) / len(times))
        ratios = [whole / bare for whole, bare in zip(seconds["run"], seconds["bare loop"], strict=True)]
        table.add_row(
            backbone, *(f"{median(values):.4f}" for values in seconds.values()),
            f"{median(ratios):.3f}", f"{min(ratios):.3f}-{max(ratios):.3f}",
            f"{median(saves):.3f}", f"{min(saves):.3f}-{max(saves):.3f}",
        )  # fmt: skip
        written.append({"backbone": backbone, "seconds": seconds, "ratios": ratios, "saving": saves})
        output.write(folder, "loop", table, written)
    Console().print(table)


def only(config: Run, name: str, steps: int) -> None:
    """Leave of a run so many full steps of one phase."""
    phase = config.phases[name]
    phase.ramp.tokens, phase.warmup_tokens = 0, 0
    config.tasks = {task: settings for task, settings in config.tasks.items() if task in objectives_of(phase)}
    cycle = cycle_tokens(phase, config.tasks)
    phase.tokens = -(-sum(cycle.values()) * steps // sum(objectives_of(phase).values()))
    config.phases = {name: phase}
    config.init.unigram &= reads_text(phase)


def bare(config: Run, steps: int = STEPS, warmup: int = WARMUP) -> float:
    """Seconds a step of the least that can be written, after some to warm up."""
    import torch

    from modernenc.data.loader import Steps
    from modernenc.data.state import DataState
    from modernenc.data.worker import StepLoader
    from modernenc.model import optim
    from modernenc.model.allocator import keep_freed_memory
    from modernenc.model.build import build_objectives
    from modernenc.planning.checks import check_run

    keep_freed_memory()
    curriculum, corpus = check_run(config)
    loader = StepLoader(Steps(config, curriculum, corpus, 0, 1, DataState()), config.data.workers, pin_memory=False)
    device = torch.device("cuda" if torch.cuda.is_available() and config.trainer.accelerator != "cpu" else "cpu")
    objectives = build_objectives(config).to(device)
    optimizers = optim.build(objectives, config.optim)
    started = 0.0
    for number, step in enumerate(islice(loader, steps)):
        if number == warmup:
            started = time.perf_counter()
        for micro_batch in step.micro_batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.precision == "bf16-mixed"):
                loss, _ = objectives(micro_batch.to(device))
            (loss / step.targets).backward()
        optim.step(optimizers)
    return (time.perf_counter() - started) / (steps - warmup)


def whole(run: Run, *callbacks: Any) -> list[float]:
    """Seconds of each step of a run, all that a run does after it included."""
    import lightning.pytorch as L

    from modernenc.planning.checks import check_run
    from modernenc.training import fit as fitting

    times: list[float] = []

    class Clock(L.Callback):
        """Notes when each step is done."""

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
            times.append(time.perf_counter())

    curriculum, corpus = check_run(run)
    from modernenc.run_folder.create import create
    from modernenc.run_folder.lineage import Event

    create(run, "")
    fitting.fit(run, curriculum, corpus, "", None, Event("start"), [Clock(), *callbacks])
    return [after - before for before, after in pairwise(times)]


def cost_of_saves(times: list[float], every: int = SAVE_EVERY) -> list[float]:
    """What each save took beyond the neighbouring steps, in steps: of the step that it ends and of the two after."""
    costs = []
    for save in range(2 * every - 1, len(times) - every, every):
        usual = median(times[save - every + 3 : save] + times[save + 3 : save + every])
        costs.append(sum(times[save : save + 3]) / usual - 3)
    return costs


def with_saves(run: Run, steps: int, scratch: str) -> dict[str, float]:
    """A run that saves some times: steps far from a save, what a save costs, what lies between two steps: the loader's wait."""
    import lightning.pytorch as L

    every, between, tokens = steps // SAVES, [], []

    class Waits(L.Callback):
        """Notes the time between the end of a step and the next."""

        ended = time.perf_counter()

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
            between.append(time.perf_counter() - self.ended)
            tokens.append(batch.tokens)

        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.ended = time.perf_counter()

    (phase,) = run.phases.values()
    only(run, "decay", steps)
    run.data.workers = 1
    run.validation.tokens_per_source = phase.seq_len
    run.checkpoint.every_minutes, run.checkpoint.every_tokens = 0, every * phase.batch_rows * phase.seq_len
    run.run_dir = f"{scratch}/run"
    with contextlib.redirect_stdout(io.StringIO()):
        times = whole(run, Waits())
    usual = [number for number in range(every, len(times)) if (number + 1) % every > 2]  # far from a save
    seconds = [times[number] for number in usual]
    return {
        "ms": 1e3 * mean(seconds), "ms_from": 1e3 * min(seconds), "ms_to": 1e3 * max(seconds), "first_s": times[0],
        "tokens_per_s": sum(tokens[number] for number in usual) / sum(seconds),
        "save_s": mean(cost_of_saves(times, every)) * mean(seconds),
        "between_ms": 1e3 * mean(between[number + 1] for number in usual),
    }  # fmt: skip
