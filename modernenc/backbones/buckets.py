"""Documents of similar length side by side, so that what is quadratic in length is a few batched matrix products."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .shapes import Bool, Float, Int
from .transfer import sent

FEW_LENGTHS_UP_TO = 512
MULTIPLE = 64
"""What longer documents are padded to a multiple of: a matrix product of a new shape has to be compiled on a CPU."""


class Buckets:
    """Documents grouped by length, padded to the longest of their group."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        counts = np.array(lengths)
        starts = counts.cumsum() - counts
        members: dict[int, list[int]] = {}
        for document, length in enumerate(lengths):
            members.setdefault(_bucket_length(length), []).append(document)
        index, valid, self.shapes = [], [], []
        self.shortest: list[int] = []
        """Tokens of the shortest document of each, before which there is no padding."""
        for length in sorted(members):
            first, count = starts[members[length], None], counts[members[length], None]
            offset = np.arange(length)
            index.append((first + np.minimum(offset, count - 1)).ravel())
            valid.append(offset < count)
            self.shapes.append((len(members[length]), length))
            self.shortest.append(int(count.min()))
        self.valid: list[Bool[Tensor, "docs length"]] = [sent(part, device) for part in valid]
        self.in_place = len(members) == 1 and self.shortest[0] == self.shapes[0][1]
        """Whether all documents are of one length, so that nothing needs to move."""
        tokens = np.concatenate(index)
        self.index: Int[Tensor, " padded"] = sent(tokens, device)
        """Token at each place of all buckets; a document's last token again where it is over."""
        places = np.concatenate([part.ravel() for part in valid]).nonzero()[0]
        inverse = np.empty_like(places)
        inverse[tokens[places]] = places
        self.inverse: Int[Tensor, " tokens"] = sent(inverse, device)

    def gather(self, x: Float[Tensor, "_ ..."]) -> list[Float[Tensor, "_ _ ..."]]:
        """A tensor of all tokens, by bucket."""
        padded = x if self.in_place else _Gather.apply(x, self.index, self.inverse)
        assert isinstance(padded, Tensor)
        parts = padded.split([docs * length for docs, length in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def scatter(self, parts: Iterable[Float[Tensor, "_ _ ..."]]) -> Float[Tensor, "_ ..."]:
        """All tokens again, from their buckets."""
        flat = [part.flatten(0, 1) for part in parts]
        if self.in_place:
            return flat[0]
        out = _Scatter.apply(torch.cat(flat), self.index, self.inverse)
        assert isinstance(out, Tensor)
        return out


class _Gather(torch.autograd.Function):
    """`x[index]`, when each row of x is meant to come from one place only: `inverse` says which."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # Places that repeat a token only pad: attention hides them as keys and drops them as queries, so their gradient
        # is zero and a gather replaces the scatter-add, which is slow and in bf16 inexact.
        _, inverse = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Scatter(torch.autograd.Function):
    """`x[inverse]`: from places back to tokens; gradients of padding places are zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        full = grads[0].new_zeros(len(index), *grads[0].shape[1:])
        return full.index_copy(0, inverse, grads[0]), None, None


def _bucket_length(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, ..., 512; then of multiples of 64, since padding a long document costs the most."""
    if length > FEW_LENGTHS_UP_TO:
        return length + -length % MULTIPLE
    power = max(16, 1 << (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 16 else power
