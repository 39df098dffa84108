"""Whether the kernels for a GPU apply, and copies to a GPU that the processor does not wait for."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from modernenc.shapes import Int

_gpu_assumed = False  # a plain variable, since torch's compiler cannot trace a ContextVar


def use_gpu_kernels(device: torch.device) -> bool:
    """Return whether kernels for a GPU apply: on one, and inside `assume_gpu`."""
    return device.type == "cuda" or _gpu_assumed


@contextmanager
def assume_gpu() -> Iterator[None]:
    """Take the code paths of a GPU without one, to trace a step; tensors must be fake, with shapes only."""
    global _gpu_assumed
    before, _gpu_assumed = _gpu_assumed, True
    try:
        yield
    finally:
        _gpu_assumed = before


def lengths_of(cu_seqlens: Int[Tensor, " docs_plus_1"]) -> list[int]:
    """Return the number of tokens of each document; this waits for the GPU unless `cu_seqlens` lies on the CPU."""
    return np.diff(cu_seqlens.tolist()).tolist()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device, from pinned memory so that the copy overlaps with a GPU's work."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
