"""Packed documents on segments of 64 tokens, as the scan of MEGA's EMA needs them."""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from modernenc.kernels.device import to_device
from modernenc.shapes import Bool, Int

SEGMENT = 64
"""Tokens per segment. A longer one costs more inside it, `SEGMENT` multiplications per token and channel, and saves passing
states between segments."""


class Documents:
    """Packed documents, and their layout on segments: each begins on one, and zeros fill its last one.

    All that is derived here depends on lengths alone, and is computed on the CPU so that a GPU never has to be waited for.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self.device = device
        self._segments = [-(-length // SEGMENT) for length in lengths]

    @cached_property
    def segments(self) -> int:
        """Number of segments of all documents."""
        return sum(self._segments)

    @cached_property
    def longest(self) -> int:
        """Number of segments of the longest document."""
        return max(self._segments)

    @cached_property
    def slot(self) -> Int[Tensor, " tokens"] | None:
        """Slot of each token on the segments; None if all documents fill theirs, so that no token moves."""
        if all(length % SEGMENT == 0 for length in self.lengths):
            return None
        lengths = np.array(self.lengths)
        gaps = np.roll((-lengths % SEGMENT).cumsum(), 1)
        gaps[0] = 0
        return to_device(np.arange(lengths.sum()) + gaps.repeat(lengths), self.device)

    def may_reach(self, step: int) -> Bool[Tensor, " segments"]:
        """Return, for each segment from number `step` on, whether the one `step` before it is of the same document."""
        return self._number[step:] >= step

    @cached_property
    def _number(self) -> Int[Tensor, " segments"]:
        """Number of each segment within its document, from 0."""
        return to_device(np.concatenate([np.arange(count) for count in self._segments]), self.device)
