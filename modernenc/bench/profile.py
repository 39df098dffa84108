"""Time a training step on a GPU, and count its kernels, its graphs, and the share of time in which the card has work."""

from dataclasses import replace
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from modernenc.bench.interleave import Metrics, StepWork, Turn, time_candidate, time_turn
from modernenc.bench.ours import our_step
from modernenc.config import Run
from modernenc.planning.memory import memory

NOT_RUN = "not run"
"""What stands for a figure that only a GPU can give, where there is none."""
LARGEST = 10


def time_step(run: Run, repetitions: int, report: Path) -> Metrics:
    """Time optimizer steps of a run, then profile one more, and write its largest kernels into a file.

    Returns the metrics of the timing; how many graphs were compiled, and how many of them after the first step; the memory that
    the plan expects; and, of the profiled step, how many kernels there were and in what share of its time the card had work.
    """
    turns: list[Turn] = []
    graphs: list[int] = []

    def candidate() -> Turn:
        turns.append(our_step(run))

        def turn(number: int) -> StepWork:
            work = turns[0](number)
            graphs.append(counters["stats"]["unique_graphs"])
            return work

        return turn

    metrics = time_candidate(candidate, repetitions)
    on_gpu = replace(run, estimate=replace(run.estimate, device="h100"))
    expected = memory(on_gpu, next(iter(run.phases.values())), None).total / 1e9
    metrics |= {"graphs": graphs[-1], "recompiled": graphs[-1] - graphs[0], "plan_gb": expected}
    if not torch.cuda.is_available():
        return {**metrics, "kernels": NOT_RUN, "busy": NOT_RUN}
    return {**metrics, **_profile(turns[0], report)}


def _profile(turn: Turn, report: Path) -> Metrics:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        _, seconds = time_turn(turn, 0)
    kernels = [
        event for event in profiled.events() or () if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(profiled.key_averages().table(sort_by="self_device_time_total", row_limit=LARGEST))
    return {"kernels": len(kernels), "busy": sum(event.device_time for event in kernels) / 1e6 / seconds}
