"""What the loop costs: `python -m modernenc.bench.loop +recipe=NAME`.

The first phase of a recipe, a hundred steps at a time, in turn: a bare PyTorch loop over the same batches with the same model
and optimizer, and a whole run. Then a run that saves every ten steps: what the steps during and after a save take beyond their
neighbours is the cost of the save, told as a share of 50 steps.
"""

import tempfile
import time
from copy import deepcopy
from itertools import islice, pairwise
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from modernenc.cli import run as run_cli
from modernenc.config import Run, register
from modernenc.curriculum import objectives_of, tokens_of_cycle

ROUNDS, STEPS, WARMUP, SAVE_EVERY = 3, 100, 5, 10
SHARE_OF = 50


def main(config: Run) -> None:
    """Measure and print the ratio to the bare loop, and the cost of saving."""
    only(config, next(iter(config.phases)), STEPS)
    (phase,) = config.phases.values()
    step_tokens = phase.batch_rows * phase.seq_len
    config.validation.tokens_per_source = phase.seq_len
    config.checkpoint.every_minutes = 0
    with tempfile.TemporaryDirectory() as folder:
        saving = deepcopy(config)
        saving.checkpoint.every_tokens, saving.run_dir = SAVE_EVERY * step_tokens, f"{folder}/saving"
        saves = cost_of_saves(whole(saving))
        seconds: dict[str, list[float]] = {"bare loop": [], "run": []}
        for number in range(ROUNDS):
            run = deepcopy(config)
            run.checkpoint.every_tokens, run.run_dir = 0, f"{folder}/{number}"
            seconds["bare loop"].append(bare(config))
            times = whole(run)[WARMUP:]
            seconds["run"].append(sum(times) / len(times))
    show(config, seconds, saves)


def only(config: Run, name: str, steps: int) -> None:
    """Leave of a run so many full steps of one phase."""
    phase = config.phases[name]
    phase.ramp.tokens, phase.warmup_tokens = 0, 0
    config.tasks = {task: settings for task, settings in config.tasks.items() if task in objectives_of(phase)}
    cycle = tokens_of_cycle(phase, config.tasks)
    phase.tokens = -(-sum(cycle.values()) * steps // sum(objectives_of(phase).values()))
    config.phases = {name: phase}


def bare(config: Run, steps: int = STEPS, warmup: int = WARMUP) -> float:
    """Seconds a step of the least that can be written, after some to warm up."""
    import torch

    from modernenc import optim
    from modernenc.checks import check_run
    from modernenc.data.loader import DataState, StepLoader, Steps
    from modernenc.fit import keep_freed_memory
    from modernenc.model import build_objectives

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


def whole(run: Run) -> list[float]:
    """Seconds of each step of a run, all that a run does after it included."""
    import lightning.pytorch as L

    from modernenc import fit as fitting
    from modernenc.checks import check_run

    times: list[float] = []

    class Clock(L.Callback):
        """Notes when each step is done."""

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
            times.append(time.perf_counter())

    curriculum, corpus = check_run(run)
    fitting.start(run, curriculum)
    fitting.fit(run, curriculum, corpus, None, {"event": "start", "checkpoint": ""}, [Clock()])
    return [after - before for before, after in pairwise(times)]


def cost_of_saves(times: list[float]) -> list[float]:
    """What each save took beyond the neighbouring steps, in steps: of the step that it ends and of the two after."""
    costs = []
    for save in range(2 * SAVE_EVERY - 1, len(times) - SAVE_EVERY, SAVE_EVERY):
        usual = median(times[save - SAVE_EVERY + 3 : save] + times[save + 3 : save + SAVE_EVERY])
        costs.append(sum(times[save : save + 3]) / usual - 3)
    return costs


def show(config: Run, seconds: dict[str, list[float]], saves: list[float]) -> None:
    """A table that fits a terminal, and the ratios."""
    table = Table(title=f"seconds a step, recipe {config.recipe}, {ROUNDS} rounds of {STEPS} steps in turn")
    for column in ("", "median", "lowest", "highest"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in seconds.items():
        table.add_row(name, *(f"{value:.4f}" for value in (median(values), min(values), max(values))))
    console = Console()
    console.print(table)
    ratios = [run / bare for run, bare in zip(seconds["run"], seconds["bare loop"], strict=True)]
    console.print(f"run / bare loop: median {median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
    shares = [1 + cost / SHARE_OF for cost in saves]
    console.print(f"saving every {SHARE_OF} steps / never: median {median(shares):.3f} of {len(saves)} saves, "
                  f"from {min(shares):.3f} to {max(shares):.3f}")  # fmt: skip


if __name__ == "__main__":
    register()
    run_cli(Run, ("recipe",), "train", main)
