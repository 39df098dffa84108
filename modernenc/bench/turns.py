"""Contestants in processes of their own, one of which works at a time: what one does to its memory is no other's matter."""

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


class Work(NamedTuple):
    """What a turn got done."""

    tokens: int
    """Real ones: no padding."""
    flops: float
    """Of matrix products that the model needs for them."""


Turn = Callable[[int], Work]
"""A turn by its number; the first, 0, is to warm up."""


class Contestant(Protocol):
    """Something to measure; picklable."""

    name: str

    def start(self) -> Turn:
        """Make ready, in its process."""
        ...


@dataclass
class Result:
    """What a contestant did."""

    name: str
    work: list[Work] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    """Of the process, or on the GPU."""
    failure: str = ""
    """Why there is nothing."""

    @property
    def speed(self) -> float:
        """Tokens a second, the median of the turns."""
        return median(self.speeds)

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of each turn."""
        return [work.tokens / seconds for work, seconds in zip(self.work, self.seconds, strict=True)]

    @property
    def flops(self) -> float:
        """Needed FLOPs a second, the median of the turns."""
        return median(work.flops / seconds for work, seconds in zip(self.work, self.seconds, strict=True))

    def times_faster(self, other: "Result") -> list[float]:
        """Ratios of the speeds, turn by turn, from the lowest on."""
        return sorted(own / theirs for own, theirs in zip(self.speeds, other.speeds, strict=True))


def take_turns(contestants: Sequence[Contestant], repetitions: int) -> list[Result]:
    """Each warms up as it comes; then all take their turns, round by round."""
    context = multiprocessing.get_context("spawn")
    results, open_pipes = [Result(contestant.name) for contestant in contestants], []
    processes = []
    try:
        for contestant in contestants:
            pipe, other = context.Pipe()
            processes.append(context.Process(target=_serve, args=(other, contestant), daemon=True))
            processes[-1].start()
            other.close()
            open_pipes.append(pipe)
            _turn(pipe, results[len(processes) - 1], 0)
        for number in range(1, repetitions + 1):
            for pipe, result in zip(open_pipes, results, strict=True):
                if not result.failure:
                    _turn(pipe, result, number)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return results


def _turn(pipe: Connection, result: Result, number: int) -> None:
    try:
        pipe.send(number)
        answer = pipe.recv()
    except (EOFError, BrokenPipeError):
        result.failure = "its process was killed, as for want of memory"
        return
    if isinstance(answer, str):
        result.failure = answer
        return
    work, seconds, result.peak_bytes = answer
    if number:
        result.work.append(work)
        result.seconds.append(seconds)


def _serve(pipe: Connection, contestant: Contestant) -> None:
    import torch

    free = limit_memory()
    try:
        turn = contestant.start()
        while True:
            number = pipe.recv()
            started = time.perf_counter()
            work = turn(number)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            pipe.send((work, seconds, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()))
    except RuntimeError as error:
        if "allocate memory" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        pipe.send(f"needs more than the {free / 1e9:.0f} GB that are free")
    except (EOFError, KeyboardInterrupt):  # the parent is gone
        return


@dataclass
class MatrixProducts:
    """The peak to hold others against: products of large square matrices, in the precision of the products of a step."""

    name: str = "matrix products"
    precision: str = "bf16-mixed"
    size: int = 4_096
    at_once: int = 4

    def start(self) -> Turn:
        """Two matrices."""
        import torch

        dtype = torch.bfloat16 if self.precision.startswith("bf16") else torch.float32
        a, b = torch.randn(2, self.size, self.size, device=device()).to(dtype)

        def turn(number: int) -> Work:
            for _ in range(self.at_once):
                torch.mm(a, b)
            return Work(0, self.at_once * 2.0 * self.size**3)

        return turn


def device() -> "torch.device":
    """Where contestants work."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def limit_memory() -> int:
    """Have this process take no more memory than is free now: so many bytes."""
    free = available_bytes()
    resource.setrlimit(resource.RLIMIT_DATA, (_held() + free, resource.RLIM_INFINITY))
    return free


def available_bytes() -> int:
    """Bytes of memory that a process may still take; all that there is, where the system does not say."""
    told = Path("/proc/meminfo")  # Linux's
    if not told.exists():
        return os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    lines = dict(line.split(":") for line in told.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _held() -> int:
    """Bytes of data that this process has taken already, where the system says."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[5]) * resource.getpagesize() if told.exists() else 0
