"""Measure a cell of the GPU benchmark. This module imports no candidate, so that a process imports only what it measures."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from modernenc.bench.interleave import Candidate, StepWork, peak_bytes, timed_turn

Metrics = dict[str, Any]
"""Measurements by their column in gpu.csv."""


def measured(measure: Callable[[], Metrics]) -> Metrics:
    """Return the metrics of a cell with the peak memory, the device and torch's version."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {**measure(), "peak_gb": peak_bytes() / 1e9, "device": name, "torch": torch.__version__}


def timed(candidate: Candidate, repetitions: int, calls: int = 1, bytes_moved: int = 0) -> Metrics:
    """Time turns after one warm-up turn, each of `calls` calls, and return the milliseconds, speed and bandwidth of a call."""
    call = candidate()

    def turn(number: int) -> StepWork:
        works = [call(number) for _ in range(calls)]
        return StepWork(sum(work.tokens for work in works), sum(work.flops for work in works))

    (_, first), *pairs = [timed_turn(turn, number) for number in range(repetitions + 1)]
    seconds = [took for _, took in pairs]
    metrics = {name: 1e3 * of(seconds) / calls for name, of in (("ms", median), ("ms_from", min), ("ms_to", max))}
    metrics["first_s"] = first
    if pairs[0][0].tokens:
        metrics["tokens_per_s"] = median(work.tokens / took for work, took in pairs)
    if pairs[0][0].flops:
        metrics["tflops"] = median(work.flops / took for work, took in pairs) / 1e12
    if bytes_moved:
        metrics["gb_per_s"] = bytes_moved / (metrics["ms"] * 1e6)
    return metrics
