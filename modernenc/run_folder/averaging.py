"""Averages of the checkpoints of one run, which can replace a learning-rate decay.

Each is a weighted sum of the checkpoints in the order of training. A learning-rate decay that scales the updates between
checkpoints i and i + 1 by w[i] corresponds to the sum with coefficients w[i] - w[i+1]: Tian et al. 2025, arXiv:2507.17634,
section 3.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from modernenc.run_folder.checkpoints import Checkpoint, read, sort_key
from modernenc.saved_config import from_plain
from modernenc.schedules import one_minus_sqrt


def uniform(number: int) -> list[float]:
    """Return equal coefficients: Izmailov et al. 2018, arXiv:1803.05407."""
    return [1 / number] * number


def exponential(number: int) -> list[float]:
    """Return coefficients that double from each checkpoint to the next."""
    powers = [2.0**index for index in range(number)]
    return [power / sum(powers) for power in powers]


def decay(number: int) -> list[float]:
    """Return the coefficients of a learning rate that falls by 1 - sqrt from the first checkpoint to the last."""
    steps = number - 1
    factors = [1.0, *(one_minus_sqrt((step + 0.5) / steps, 0) for step in range(steps)), 0.0]
    return [before - after for before, after in pairwise(factors)]


KINDS: dict[str, Callable[[int], list[float]]] = {"uniform": uniform, "exponential": exponential, "one_minus_sqrt": decay}
"""Coefficients of a number of checkpoints, the earliest first, by the name of the average; they sum to 1."""


def average(paths: list[Path], kind: str, across_runs: bool = False) -> Checkpoint:
    """Return the last checkpoint with the averaged weights of all, summed in fp64, without optimizer states.

    Weights of runs that began apart average to nothing useful, so all must be of one run and its branches, unless
    `across_runs`. Raises ValueError if `kind` is unknown, or, naming the checkpoint, if one is not whole or belongs to another
    run or model.
    """
    if kind not in KINDS:
        raise ValueError(f"--average {kind}: expected one of {', '.join(sorted(KINDS))}")
    paths = sorted(paths, key=sort_key)
    sums: dict[str, Any] = {}
    last, group = None, ""
    for path, coefficient in zip(paths, KINDS[kind](len(paths)), strict=True):
        last = read(path)  # one checkpoint at a time is in memory
        mine = from_plain(last.run).logger.group
        group = group or mine
        if mine != group and not across_runs:
            raise ValueError(
                f"{path} is of another run than those before it: an average of runs that began apart is no model; to make it "
                "all the same, add --across-runs"
            )
        shapes = {name: value.shape for name, value in last.weights.items()}
        if sums and shapes != {name: value.shape for name, value in sums.items()}:
            raise ValueError(f"{path} is of another model than those before it; average checkpoints of one run")
        for name, value in last.weights.items():
            sums[name] = sums.get(name, 0) + coefficient * value.double()
    assert last is not None
    weights = {name: value.to(last.weights[name].dtype) for name, value in sums.items()}
    return replace(last, weights=weights, optimizers=[])
