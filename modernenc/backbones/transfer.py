"""Where a batch is worked on, and how what the processor works out about it gets there without the processor waiting."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .shapes import Int

_traced = False  # a plain variable: torch's compiler cannot trace a ContextVar


def on_gpu(device: torch.device) -> bool:
    """Whether kernels for a GPU are taken: on one, and where a step on one is traced without it."""
    return device.type == "cuda" or _traced


@contextmanager
def traced_as_on_a_gpu() -> Iterator[None]:
    """Have tensors on the CPU, which must have shapes only, go the ways that they would go on a GPU."""
    global _traced
    before, _traced = _traced, True
    try:
        yield
    finally:
        _traced = before


def lengths_of(cu_seqlens: Int[Tensor, " docs_plus_1"]) -> list[int]:
    """Tokens of each document; at once where `cu_seqlens` lies on the CPU, as that of a batch does."""
    return np.diff(cu_seqlens.tolist()).tolist()


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device, from pinned memory where copies can overlap with work."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
