"""What is worked out on the processor about a batch, and how it gets to the model without the processor waiting for it."""

import numpy as np
import torch
from torch import Tensor

from .shapes import Int


def lengths_of(cu_seqlens: Int[Tensor, " docs_plus_1"]) -> list[int]:
    """Tokens of each document; at once where `cu_seqlens` lies on the CPU, as that of a batch does."""
    return np.diff(cu_seqlens.tolist()).tolist()


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device, from pinned memory where copies can overlap with work."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
