"""Measure candidates that take turns, each in a process of its own, so that none changes another's memory or caches."""

import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from signal import SIGKILL
from statistics import median
from typing import Any, NamedTuple

import torch


class StepWork(NamedTuple):
    """The work that one turn did."""

    tokens: int
    """Tokens without padding."""
    flops: float
    """FLOPs of the matrix products that the model needs for these tokens."""


Turn = Callable[[int], StepWork]
"""A function that takes the turn of a given number; turn 0 is the warm-up."""
Candidate = Callable[[], Turn]
"""A picklable function that makes everything ready in its own process and returns how it takes a turn.

The process imports the module that defines the function, so that module should import no other candidate's libraries."""
Metrics = dict[str, Any]
"""Measurements by their column in gpu.csv."""


@dataclass
class Result:
    """The measurements of one candidate."""

    name: str
    work: list[StepWork] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    """Peak memory of the process, or of the GPU if there is one."""
    failure: str = ""
    """Why there are no measurements."""

    @property
    def speeds(self) -> list[float]:
        """Speed of each measured turn, in tokens per second."""
        return [work.tokens / seconds for work, seconds in zip(self.work, self.seconds, strict=True)]

    @property
    def flops(self) -> float:
        """Median over the turns of needed FLOPs per second."""
        return median(work.flops / seconds for work, seconds in zip(self.work, self.seconds, strict=True))

    def times_faster(self, other: "Result") -> list[float]:
        """Return the ratios of this candidate's speed to another's, turn by turn, in ascending order."""
        return sorted(own / theirs for own, theirs in zip(self.speeds, other.speeds, strict=True))


class Failure(Exception):
    """Why a process returned nothing."""


class OwnProcess(ProcessPoolExecutor):
    """A new process, which may allocate the memory that is free when it starts, and imports only what it is sent."""

    def __init__(self) -> None:
        super().__init__(1, get_context("spawn"), initializer=_limit_memory)

    def call(self, function: Callable[..., Any], *arguments: Any, limit_s: float | None = None) -> Any:
        """Call a function in the child process and return its result.

        Raises Failure if the function raises or takes longer than `limit_s`, or if the child process dies.
        """
        process, free = self.submit(os.getpid).result(), available_bytes()
        future = self.submit(function, *arguments)
        try:
            error = future.exception(limit_s)
        except TimeoutError:
            os.kill(process, SIGKILL)
            raise Failure(f"took more than {limit_s:g} s") from None
        if error is None:
            return future.result()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, BrokenProcessPool):
            reason = "its process was killed, probably for lack of memory"
        elif isinstance(error, RuntimeError) and "allocate memory" in str(error):
            reason = f"needs more than the {free / 1e9:.0f} GB that are free"
        raise Failure(reason)


def run_interleaved(candidates: Mapping[str, Candidate], repetitions: int) -> list[Result]:
    """Start the candidates one after another, each with a warm-up turn, then let all take a turn in each of the rounds."""
    results = [Result(name) for name in candidates]
    with ExitStack() as stack:
        processes = [stack.enter_context(OwnProcess()) for _ in candidates]
        for number in range(repetitions + 1):
            for process, result, candidate in zip(processes, results, candidates.values(), strict=True):
                try:
                    if not result.failure:
                        work, seconds, result.peak_bytes = process.call(_take_turn, number, None if number else candidate)
                        result.work += [work] if number else []
                        result.seconds += [seconds] if number else []
                except Failure as failure:
                    result.failure = str(failure)
    return results


_turn: Turn
"""How the candidate of this process takes a turn."""


def _take_turn(number: int, candidate: Candidate | None) -> tuple[StepWork, float, int]:
    global _turn
    if candidate:
        _turn = candidate()
    return *time_turn(_turn, number), peak_bytes()


def time_candidate(candidate: Candidate, repetitions: int, calls: int = 1, bytes_moved: int = 0) -> Metrics:
    """Time turns in this process after a warm-up turn, and return the milliseconds, speed and bandwidth of a turn.

    What takes little time is measured `calls` turns at once.
    """
    take_turn = candidate()

    def take_turns(number: int) -> StepWork:
        return [take_turn(number) for _ in range(calls)][-1]

    (_, first), *timed = [time_turn(take_turns, number) for number in range(repetitions + 1)]
    result = Result("", [work for work, _ in timed], [seconds / calls for _, seconds in timed])
    metrics = {name: 1e3 * of(result.seconds) for name, of in (("ms", median), ("ms_from", min), ("ms_to", max))}
    metrics["first_s"] = first
    if result.work[0].tokens:
        metrics["tokens_per_s"] = median(result.speeds)
    if result.work[0].flops:
        metrics["tflops"] = result.flops / 1e12
    if bytes_moved:
        metrics["gb_per_s"] = bytes_moved / (metrics["ms"] * 1e6)
    return metrics


def time_turn(turn: Turn, number: int) -> tuple[StepWork, float]:
    """Take a turn and return its work and its seconds, including those until the GPU is done."""
    started = time.perf_counter()
    work = turn(number)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return work, time.perf_counter() - started


def device() -> torch.device:
    """Return the device that candidates run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def available_bytes() -> int:
    """Return the bytes of memory that a process can still allocate, or all memory where the system does not report it."""
    meminfo = Path("/proc/meminfo")  # Linux only
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _limit_memory() -> None:
    """Limit this process to the memory that it has and that is free now."""
    statm = Path("/proc/self/statm")  # Linux only
    data = int(statm.read_text().split()[5]) * resource.getpagesize() if statm.exists() else 0
    resource.setrlimit(resource.RLIMIT_DATA, (data + available_bytes(), resource.RLIM_INFINITY))


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes, or that of its tensors on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
