"""Time real training steps in a minimal loop, for `plan --measure` and as the baseline of the loop benchmark."""

import time
from dataclasses import replace
from itertools import islice

import torch

from modernenc.config import Run
from modernenc.curriculum import Curriculum, cycle_tokens, objectives_of, reads_text
from modernenc.data.blocks import Corpus
from modernenc.data.loader import Steps
from modernenc.data.state import DataState
from modernenc.data.worker import StepLoader
from modernenc.model import optim
from modernenc.model.allocator import keep_freed_memory
from modernenc.model.build import build_objectives, speed_up

WARMUP, STEPS = 2, 10
"""Steps of each phase before the measured ones, and measured steps."""


def only_phase(run: Run, name: str, steps: int) -> Run:
    """Return a run of `steps` optimizer steps of one phase at its full batch size, without warmup or ramp."""
    phase = run.phases[name]
    tasks = {task: settings for task, settings in run.tasks.items() if task in objectives_of(phase)}
    tokens = -(-sum(cycle_tokens(phase, tasks).values()) * steps // sum(objectives_of(phase).values()))
    phase = replace(phase, tokens=tokens, warmup_tokens=0, ramp=replace(phase.ramp, tokens=0))
    init = run.init if reads_text(phase) else replace(run.init, unigram=False, neighbours=False)
    return replace(run, phases={name: phase}, tasks=tasks, init=init)


def bare_loop_step_seconds(run: Run, steps: int, warmup: int) -> float:
    """Train for `steps` steps in the shortest possible PyTorch loop and return the mean seconds per step after `warmup` steps.

    The run's batches, model and optimizer are used on one device. There is no validation, logging or saving.
    """
    keep_freed_memory()
    batches = Steps(run, Curriculum.of(run), Corpus.of(run.data), 0, 1, DataState())
    loader = StepLoader(batches, run.data.workers, pin_memory=False)
    device = torch.device("cuda" if torch.cuda.is_available() and run.trainer.accelerator != "cpu" else "cpu")
    objectives = build_objectives(run).to(device)
    speed_up(objectives.backbone, run.trainer, device)
    optimizers = optim.build(objectives, run.optim)
    started = 0.0
    for number, step in enumerate(islice(loader, steps)):
        if number == warmup:
            started = _now(device)
        for micro_batch in step.micro_batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=run.trainer.precision == "bf16-mixed"):
                loss, _ = objectives(micro_batch.to(device))
                (loss / step.targets).backward()  # under autocast, as Lightning does it
        optim.step(optimizers)
    return (_now(device) - started) / (steps - warmup)


def _now(device: torch.device) -> float:
    """Return the time in seconds when a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def tokens_per_second(run: Run) -> dict[str, float]:
    """Return the tokens a second of each phase on one device of this machine, measured on some full steps; data must exist."""
    speeds = {}
    for name, phase in run.phases.items():
        short = only_phase(replace(run, trainer=replace(run.trainer, devices=1, num_nodes=1)), name, WARMUP + STEPS)
        step_tokens = sum(cycle_tokens(phase, run.tasks).values()) / sum(objectives_of(phase).values())
        speeds[name] = step_tokens / bare_loop_step_seconds(short, WARMUP + STEPS, WARMUP)
    return speeds
