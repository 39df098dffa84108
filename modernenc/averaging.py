"""Averages of the checkpoints of one run, which can take the place of a learning-rate decay.

Each is a weighted sum of weights, in the order of training. What a decay does, a sum can do to what was learnt between one
checkpoint and the next: with factors w[i] on those steps, the weights of the sum are w[i] - w[i+1]: Tian et al. 2025,
arXiv:2507.17634, section 3.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from modernenc.curriculum import one_minus_sqrt


def uniform(number: int) -> list[float]:
    """All alike: Izmailov et al. 2018, arXiv:1803.05407."""
    return [1 / number] * number


def exponential(number: int) -> list[float]:
    """Each counts twice as much as the one before it."""
    shares = [2.0**index for index in range(number)]
    return [share / sum(shares) for share in shares]


def decay(number: int) -> list[float]:
    """As if the learning rate had fallen by 1 - sqrt from the first checkpoint to the last."""
    steps = number - 1
    factors = [1.0, *(one_minus_sqrt((step + 0.5) / steps, 0) for step in range(steps)), 0.0]
    return [before - after for before, after in pairwise(factors)]


KINDS: dict[str, Callable[[int], list[float]]] = {"uniform": uniform, "exponential": exponential, "one_minus_sqrt": decay}
"""Weights of so many checkpoints, the earliest first; they sum to 1."""


def average(checkpoints: list[Path], kind: str) -> dict[str, Any]:
    """The content of the last checkpoint with the averaged weights of all, summed in fp64; no optimizer states.

    ValueError names a checkpoint that is not whole, or that is of another model.
    """
    from modernenc.checkpoints import order, read

    checkpoints = sorted(checkpoints, key=order)
    contents = ((path, read(path)) for path in checkpoints)
    shares = KINDS[kind](len(checkpoints))
    last, sums = _summed(contents, shares)
    weights = {name: value.to(last["weights"][name].dtype) for name, value in sums.items()}
    return {**last, "weights": weights, "optimizers": []}


def _summed(contents: Iterator[tuple[Path, dict[str, Any]]], shares: list[float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last content, and the sum of all weights; one checkpoint is held at a time."""
    sums: dict[str, Any] = {}
    content: dict[str, Any] = {}
    for (path, content), share in zip(contents, shares, strict=True):
        shapes = {name: value.shape for name, value in content["weights"].items()}
        if sums and shapes != {name: value.shape for name, value in sums.items()}:
            raise ValueError(f"{path} is of another model than those before it; average checkpoints of one run")
        for name, value in content["weights"].items():
            sums[name] = sums.get(name, 0) + share * value.double()
    return content, sums
