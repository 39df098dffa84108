"""Rotary attention by plain matrix products, for any device and precision, with a backward pass of its own.

Tokens are laid out head by head, queries and keys rotated on the way, in blocks of one shape: those of a window, or documents
of similar length. Each block is a product, a softmax and a product, on so few scores at a time that they stay in a processor's
cache. The backward pass makes the scores again, but for those of windows and short documents: so nothing of length x length
is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from modernenc.backbones.buckets import MULTIPLE
from modernenc.backbones.rotary import Rotation, rotate_into

SCORES = 1 << 20
"""Scores that each thread works on at a time, about."""
HEADS = 2
"""Heads that are worked on at a time, at least: oneDNN is five times slower at the product of one transposed matrix than at
that of several."""
KEPT = 512
"""Keys of a block up to which its shares are kept for the backward pass."""


@dataclass(frozen=True)
class Blocks:
    """Blocks side by side, each of so many queries; where keys are more, they begin before the queries and end after them."""

    start: int
    """Place of the first query."""
    count: int
    queries: int
    keys: int
    bias: Float[Tensor, "count _ last_keys"] | None
    """For the last keys, 0 where a query may see one, the lowest number where not; all see those before. None: all see all."""

    def of_queries(self, x: Float[Tensor, "heads places head_dim"]) -> Float[Tensor, "heads count queries head_dim"]:
        """A view of the blocks' queries."""
        return x[:, self.start : self.start + self.count * self.queries].unflatten(1, (self.count, self.queries))

    def of_keys(self, x: Float[Tensor, "heads places head_dim"]) -> Float[Tensor, "heads count keys head_dim"]:
        """A view of the blocks' keys, those of neighbours overlapping; `x` has a margin for the first and the last."""
        end = self.start + (self.count - 1) * self.queries + self.keys
        return x[:, self.start : end].unfold(1, self.keys, self.queries).transpose(2, 3)

    def add(
        self, x: Float[Tensor, "heads places head_dim"], part: Float[Tensor, "heads some keys head_dim"], first: int
    ) -> None:
        """Add to `x` what belongs to the keys of some blocks, the `first` and those after it."""
        for number, piece in enumerate(part.split(self.queries, dim=2)):
            start = self.start + (first + number) * self.queries
            x[:, start : start + part.shape[1] * self.queries] += piece.flatten(1, 2)

    def parts(self, heads: int, scores: int) -> Iterator[tuple[slice, slice, list[slice]]]:
        """Some heads of some blocks, and ranges of their queries, for so many scores at a time, about."""
        each = self.queries * self.keys
        groups = max(1, min(ceil(heads * each / scores), heads // HEADS))
        some_heads = ceil(heads / groups)
        together = max(1, scores // (some_heads * each))
        rows = MULTIPLE * ceil(self.queries / ceil(some_heads * each / scores) / MULTIPLE)
        ranges = [slice(first, first + rows) for first in range(0, self.queries, rows)]
        for head in range(0, heads, some_heads):
            for first in range(0, self.count, together):
                yield slice(head, head + some_heads), slice(first, first + together), ranges


@dataclass(frozen=True)
class Arrangement:
    """How tokens are laid out in blocks."""

    blocks: list[Blocks]
    places: int
    margin: int
    """Places that keys have before and after those."""
    index: Int[Tensor, " laid"] | None
    """Token at each of the first places; None where all are in order."""
    inverse: Int[Tensor, " tokens"] | None
    """Place of each token."""


def block_attention(
    qkv: Float[Tensor, "tokens 3 heads head_dim"], rotation: Rotation, arrangement: Arrangement
) -> Float[Tensor, "tokens heads head_dim"]:
    """Softmax attention with rotated queries and keys, within blocks."""
    out = _BlockAttention.apply(qkv, rotation.cos, rotation.sin, arrangement)
    assert isinstance(out, Tensor)
    return out


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, arrangement: Arrangement) -> Tensor:
        index, inverse = arrangement.index, arrangement.inverse
        # Autocast would take softmax to fp32 and back, for three times the cost.
        with torch.autocast(qkv.device.type, enabled=False):
            laid, cos, sin = (x if index is None else x.index_select(0, index) for x in (qkv, cos, sin))
            _, _, heads, head_dim = laid.shape
            q = laid.new_empty(heads, arrangement.places, head_dim)
            k, v = kv = laid.new_empty(2, heads, arrangement.places + 2 * arrangement.margin, head_dim)
            inner = slice(arrangement.margin, arrangement.margin + len(laid))
            q[:, len(laid) :], kv[:, :, : inner.start], kv[:, :, inner.stop :] = 0, 0, 0
            of_queries, of_keys = _rotations(cos, sin, laid)
            sources = laid.permute(1, 2, 0, 3)
            rotate_into(q[:, : len(laid)], sources[0], of_queries)
            rotate_into(k[:, inner], sources[1], of_keys)
            v[:, inner] = sources[2]
            out = laid.new_empty(arrangement.places, heads, head_dim)
            kept: list[Tensor] = []
            ctx.scores = SCORES * torch.get_num_threads()  # noted: the backward pass takes the kept shares in the same order
            for blocks in arrangement.blocks:
                queries, keys, values = blocks.of_queries(q), blocks.of_keys(k), blocks.of_keys(v)
                outs = blocks.of_queries(out.transpose(0, 1))
                for h, n, ranges in blocks.parts(heads, ctx.scores):
                    some_keys, some_values = keys[h, n].flatten(0, 1).contiguous(), values[h, n].flatten(0, 1).contiguous()
                    for r in ranges:
                        some = queries[h, n, r]
                        shares = _shares(some.flatten(0, 1), some_keys, blocks.bias, n, r)
                        outs[h, n, r] = (shares @ some_values).view(some.shape)
                        if blocks.keys <= KEPT and any(ctx.needs_input_grad):
                            kept.append(shares)
            ctx.save_for_backward(q, k, v, cos, sin, *kept)
            ctx.arrangement = arrangement
            return out[: len(qkv)] if inverse is None else out.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        q, k, v, cos, sin, *rest = ctx.saved_tensors
        kept = iter(rest)
        arrangement: Arrangement = ctx.arrangement
        inverse, count = arrangement.inverse, len(cos)
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            grad = q.new_zeros(arrangement.places, len(q), q.shape[2])
            if inverse is None:
                grad[:count] = grads[0]
            else:
                grad.index_copy_(0, inverse, grads[0])
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for blocks in arrangement.blocks:
                queries, keys, values = blocks.of_queries(q), blocks.of_keys(k), blocks.of_keys(v)
                outs, dqueries = blocks.of_queries(grad.transpose(0, 1)), blocks.of_queries(dq)
                for h, n, ranges in blocks.parts(len(q), ctx.scores):
                    some_keys, some_values = keys[h, n].flatten(0, 1).contiguous(), values[h, n].flatten(0, 1).contiguous()
                    sums: list[Tensor] = []
                    for r in ranges:
                        some, out = queries[h, n, r].flatten(0, 1), outs[h, n, r].flatten(0, 1)
                        shares = next(kept) if blocks.keys <= KEPT else _shares(some, some_keys, blocks.bias, n, r)
                        dscores = torch.ops.aten._softmax_backward_data(
                            out @ some_values.transpose(1, 2), shares, -1, shares.dtype
                        )
                        dqueries[h, n, r] = (dscores @ some_keys).view(queries[h, n, r].shape)
                        made = dscores.transpose(1, 2) @ some, shares.transpose(1, 2) @ out
                        if not sums:  # sums of many in bf16 would lose too much
                            sums = list(made) if len(ranges) == 1 else [now.to(wide) for now in made]
                        else:
                            sums = [before.add_(now) for before, now in zip(sums, made, strict=True)]
                    for x, now in zip((dk, dv), sums, strict=True):
                        blocks.add(x[h], now.view(keys[h, n].shape), n.start)
            inner = slice(arrangement.margin, arrangement.margin + count)
            dqkv = q.new_empty(count, 3, len(q), q.shape[2])
            targets = dqkv.permute(1, 2, 0, 3)
            of_queries, of_keys = _rotations(cos, sin, q)
            rotate_into(targets[0], dq[:, :count], _back(of_queries))
            rotate_into(targets[1], dk[:, inner], _back(of_keys))
            targets[2].copy_(dv[:, inner])
            return dqkv if inverse is None else dqkv.index_select(0, inverse), None, None, None


def _shares(q: Tensor, k: Tensor, bias: Tensor | None, n: slice, r: slice) -> Tensor:
    """What each query takes from each key."""
    scores = q @ k.transpose(1, 2)
    if bias is not None:
        some = bias[n] if bias.shape[1] == 1 else bias[n, r]
        scores.unflatten(0, (-1, len(some)))[..., -some.shape[-1] :].add_(some)
    return scores.softmax(-1)


def _rotations(cos: Tensor, sin: Tensor, like: Tensor) -> tuple[Rotation, Rotation]:
    """That of queries, which scales scores along the way, and that of keys."""
    wide, scale = torch.promote_types(like.dtype, cos.dtype), like.shape[-1] ** -0.5
    scaled = Rotation((cos.to(wide) * scale).to(like.dtype), (sin.to(wide) * scale).to(like.dtype))
    return scaled, Rotation(cos.to(like.dtype), sin.to(like.dtype))


def _back(rotation: Rotation) -> Rotation:
    return Rotation(rotation.cos, -rotation.sin)
