"""Packed documents on segments of 64 tokens, as the scan of MEGA's EMA needs them."""

import numpy as np
import torch
from torch import Tensor

from modernenc.kernels.device import to_device, use_gpu_kernels
from modernenc.shapes import Bool, Int

SEGMENT = 64
"""Tokens per segment. A longer one costs more inside it, `SEGMENT` multiplications per token and channel, and saves passing
states between segments."""
MULTIPLE = 16
"""On a GPU, the number of segments is a multiple of this: the rows of a matrix must be aligned, or a product falls back to
instructions of older GPUs."""


class Documents:
    """Packed documents, and their layout on segments: each begins on one, and zeros fill its last one.

    All that is derived here depends on lengths alone, and is computed on the CPU so that a GPU never has to be waited for. On a
    GPU, no choice of code depends on lengths, so that one compiled graph serves all: tokens always move to slots, and states
    always pass. If `causal`, no token is to see those after it.
    """

    def __init__(self, lengths: list[int], device: torch.device, causal: bool = False) -> None:
        self.lengths = lengths
        self.causal = causal
        self.device = device
        on_gpu = use_gpu_kernels(device)
        counts = [-(-length // SEGMENT) for length in lengths]
        self.longest = max([2] * on_gpu + counts)
        """Number of segments of the longest document, at least 2 on a GPU; if 1, no states pass."""
        empty = [0] * (-sum(counts) % (MULTIPLE if on_gpu else 1))
        self.number: Int[Tensor, " segments"] = to_device(np.concatenate([*map(np.arange, counts), empty]).astype(int), device)
        """Number of each segment within its document, from 0; 0 for those after the last document."""
        self.slot: Int[Tensor, " tokens"] | None = None
        """Slot of each token on the segments; None if all documents fill theirs, so that no token moves."""
        self.source: Int[Tensor, " slots"] | None = None
        """Token in each slot, or the number of tokens where there is none; None along with `slot`."""
        if on_gpu or any(length % SEGMENT for length in lengths):
            tokens, ends = np.arange(sum(lengths)), np.cumsum(lengths)
            gaps = np.cumsum(counts) * SEGMENT - ends  # the empty slots up to the end of each document
            slot = tokens + np.repeat([0, *gaps[:-1]], lengths)
            source = np.full(len(self.number) * SEGMENT, len(tokens))
            source[slot] = tokens
            self.slot, self.source = to_device(slot, device), to_device(source, device)

    def may_reach(self, step: int) -> Bool[Tensor, " segments"]:
        """Return, for each segment from number `step` on, whether the one `step` before it is of the same document."""
        return self.number[step:] >= step
