"""Time real training steps in a minimal loop, for `plan --measure` and as the baseline of the loop benchmark."""

import time
from itertools import islice

import torch

from modernenc import optim
from modernenc.config import Run
from modernenc.curriculum import Curriculum, objectives_of, reads_text, tokens_of_cycle
from modernenc.data.blocks import Corpus
from modernenc.data.loader import DataState, Steps
from modernenc.data.worker import StepLoader
from modernenc.fit import keep_freed_memory
from modernenc.model import build_objectives


def keep_phase(run: Run, name: str, steps: int) -> None:
    """Reduce a run, in place, to `steps` optimizer steps of one phase at its full batch size, without warmup or ramp."""
    phase = run.phases[name]
    phase.ramp.tokens, phase.warmup_tokens = 0, 0
    run.tasks = {task: settings for task, settings in run.tasks.items() if task in objectives_of(phase)}
    cycle = tokens_of_cycle(phase, run.tasks)
    phase.tokens = -(-sum(cycle.values()) * steps // sum(objectives_of(phase).values()))
    run.phases = {name: phase}
    run.init.unigram &= reads_text(phase)


def bare_loop_step_seconds(run: Run, steps: int, warmup: int) -> float:
    """Train for `steps` steps in the shortest possible PyTorch loop and return the mean seconds per step after `warmup` steps.

    The run's batches, model and optimizer are used on one device. There is no validation, logging or saving.
    """
    keep_freed_memory()
    batches = Steps(run, Curriculum.of(run), Corpus.of(run.data), 0, 1, DataState())
    loader = StepLoader(batches, run.data.workers, pin_memory=False)
    device = torch.device("cuda" if torch.cuda.is_available() and run.trainer.accelerator != "cpu" else "cpu")
    objectives = build_objectives(run).to(device)
    optimizers = optim.build(objectives, run.optim)
    started = 0.0
    for number, step in enumerate(islice(loader, steps)):
        if number == warmup:
            started = time.perf_counter()
        for micro_batch in step.micro_batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=run.trainer.precision == "bf16-mixed"):
                loss, _ = objectives(micro_batch.to(device))
            (loss / step.targets).backward()
        optim.step(optimizers)
    return (time.perf_counter() - started) / (steps - warmup)
