"""Distances between tensors, documents of random tokens, and packing by hand."""

import pytest
import torch
import transformers
from torch import Tensor

of_transformers_4 = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) > 4, reason="transformers 5 has no MEGA")
"""Marks a test that compares with the MEGA of transformers."""


def relative(one: Tensor, other: Tensor) -> float:
    """Return the distance of two tensors, relative to the norm of the other."""
    return float((one - other).detach().norm() / other.detach().norm())


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference of logits, relative to the largest of the other's or to 1."""
    assert other
    largest = max(1.0, *(float(part.abs().max()) for part in other))
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / largest


def ids(lengths: list[int]) -> list[Tensor]:
    """Return documents of random ordinary tokens, of ids 3 to 199."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 200, (length,), generator=generator) for length in lengths]
