"""Documents of similar length side by side, so that what is quadratic in length is a few batched matrix products."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .shapes import Bool, Float, Int

FEW_LENGTHS_UP_TO = 512
MULTIPLE = 64
"""What longer documents are padded to a multiple of: a matrix product of a new shape has to be compiled on a CPU."""


class Buckets:
    """Documents grouped by length, padded to the longest of their group."""

    def __init__(self, cu_seqlens: Int[Tensor, " docs_plus_1"]) -> None:
        starts, lengths = cu_seqlens[:-1].tolist(), cu_seqlens.diff().tolist()
        members: dict[int, list[int]] = {}
        for document, length in enumerate(lengths):
            members.setdefault(_bucket_length(length), []).append(document)
        device = cu_seqlens.device
        index, valid, self.shapes = [], [], []
        for length in sorted(members):
            first = torch.tensor([starts[d] for d in members[length]], device=device)[:, None]
            count = torch.tensor([lengths[d] for d in members[length]], device=device)[:, None]
            offset = torch.arange(length, device=device)
            index.append((first + offset.minimum(count - 1)).flatten())
            valid.append(offset < count)
            self.shapes.append((len(members[length]), length))
        self.valid: list[Bool[Tensor, "docs length"]] = valid
        self.full = [all(lengths[d] == length for d in members[length]) for length in sorted(members)]
        """Whether a bucket has no padding."""
        self.in_place = len(members) == 1 and self.full[0]
        """Whether all documents are of one length, so that nothing needs to move."""
        self.index: Int[Tensor, " padded"] = torch.cat(index)
        """Token at each place of all buckets; a document's last token again where it is over."""
        flat = torch.cat([v.flatten() for v in valid])
        places = flat.nonzero().flatten()
        self.inverse: Int[Tensor, " tokens"] = torch.empty_like(places)
        self.inverse[self.index[places]] = places

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
