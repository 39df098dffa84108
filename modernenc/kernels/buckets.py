"""Documents of similar length side by side, so that what is quadratic in length becomes a few batched matrix products.

Attention over a whole document needs a product of its own per document. Thousands of small products would each be too little
work for a processor, and one product padded to the longest document would waste most of it. Buckets are the compromise:
documents are padded to the next of a few lengths, and each bucket is one batch.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modernenc.kernels.device import to_device
from modernenc.shapes import Bool, Float, Int

FEW_LENGTHS_UP_TO = 512
"""Documents up to this length are padded to one of few lengths, longer ones to a multiple of `MULTIPLE`."""
SHORTEST = 16
"""Shortest padded length of a document."""
MULTIPLE = 64
"""Longer documents are padded to a multiple of this: oneDNN compiles a matrix product for each new shape."""


class Buckets:
    """Documents grouped by length and padded to the length of their group.

    They are padded to the next length in `padded_to`, by default to the `bucket_length` of each. With `min_rows`, every length
    in it has a bucket of at least so many rows, and a mask, whatever the documents; rows to spare repeat the first token.
    """

    def __init__(
        self, lengths: Sequence[int], device: torch.device, padded_to: Collection[int] | None = None, min_rows: int = 0
    ) -> None:
        spare = len(lengths)  # number of a document of one token, for rows to spare
        counts = np.array([*lengths, 1])
        starts = counts.cumsum() - counts
        starts[spare] = 0
        sizes = sorted(padded_to or set(map(bucket_length, lengths)))
        members: list[list[int]] = [[] for _ in sizes]
        for document, bucket in enumerate(np.searchsorted(sizes, lengths)):
            members[bucket].append(document)
        filled_up = [these + [spare] * (min_rows - len(these)) for these in members]
        groups = [(length, these) for length, these in zip(sizes, filled_up, strict=True) if these]
        self.rows = {length: len(documents) for length, documents in groups}
        """Number of documents in each bucket, by the length that they are padded to."""
        self.shortest = [int(counts[documents].min()) for _, documents in groups]
        """Length of the shortest document of each bucket; no document has padding before that position."""
        valid = [np.arange(length) < counts[documents, None] for length, documents in groups]
        self.valid: list[Bool[Tensor, "docs length"]] = [to_device(part, device) for part in valid]
        """Which slots of each bucket hold a token; the others are padding."""
        self.masks = [None if part.all() and not min_rows else mask for part, mask in zip(valid, self.valid, strict=True)]
        """The same, or None for a bucket without padding."""
        self.index: Int[Tensor, " padded"] | None = None
        """The token in each slot of all buckets; padding repeats its document's last token. None if tokens need not move."""
        self.inverse: Int[Tensor, " tokens"] | None = None
        """The slot of each token, or None."""
        if min_rows or self.rows != {self.shortest[0]: len(lengths)}:
            index = [starts[these, None] + np.minimum(np.arange(length), counts[these, None] - 1) for length, these in groups]
            needed = [part & (np.array(these)[:, None] != spare) for part, (_, these) in zip(valid, groups, strict=True)]
            tokens, filled = (np.concatenate([part.ravel() for part in parts]) for parts in (index, needed))
            slots = filled.nonzero()[0]
            inverse = np.empty_like(slots)
            inverse[tokens[slots]] = slots
            self.index, self.inverse = to_device(tokens, device), to_device(inverse, device)

    def gather(self, x: Float[Tensor, "_ ..."]) -> list[Float[Tensor, "_ _ ..."]]:
        """Sort a tensor of all tokens into buckets, each `(documents, length, ...)`."""
        padded: Any = x if self.index is None else _Gather.apply(x, self.index, self.inverse)
        parts = padded.split([rows * length for length, rows in self.rows.items()])
        return [part.unflatten(0, (rows, length)) for part, (length, rows) in zip(parts, self.rows.items(), strict=True)]

    def scatter(self, parts: Iterable[Float[Tensor, "_ _ ..."]]) -> Float[Tensor, "_ ..."]:
        """Undo `gather`: bring the buckets back into the order of the tokens."""
        flat = [part.flatten(0, 1) for part in parts]
        out: Any = flat[0] if self.index is None else _Scatter.apply(torch.cat(flat), self.index, self.inverse)
        return out


class _Gather(torch.autograd.Function):
    """`x[index]`, with a backward pass that reads each token's gradient from the one slot that `inverse` names."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # A token that is repeated as padding gets no gradient from there: attention masks padding as a key and drops it as a
        # query. So a gather can replace the scatter-add of autograd, which is slow, and inexact in bf16.
        _, inverse = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Scatter(torch.autograd.Function):
    """`x[inverse]`, from slots back to tokens; the gradients of padding are zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        full = grads[0].new_zeros(len(index), *grads[0].shape[1:])
        return full.index_copy(0, inverse, grads[0]), None, None


def bucket_length(length: int) -> int:
    """Return the padded length: the next of 16, 24, 32, 48, 64, ..., 512, then the next multiple of 64.

    Powers of two alone would waste up to half of a product; above 512 padding costs the most, so it is kept below 64.
    """
    if length > FEW_LENGTHS_UP_TO:
        return length + -length % MULTIPLE
    power = max(SHORTEST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > SHORTEST else power
