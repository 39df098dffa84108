"""Rotary softmax attention by plain matrix products, on any device and in any precision, with its own backward pass.

torch has no attention over packed documents on a CPU, and its dense one would cost length x length even where a token only
sees a window. Here attention is cut into *tiles*, each the product of one range of queries with one range of keys:

- With a window of w tokens to each side, queries are cut into ranges of w. All keys that a range can see lie in it and in its
  two neighbours, so a tile is w x 3w and the cost is linear in the number of tokens. A mask hides what is too far away or
  belongs to another document.
- Without a window, documents are sorted into buckets of similar length, and a tile is one document: length x length.
- If no token sees those after it, a window's tile is w x 2w, and of a document each range of queries takes the keys before its
  end alone.

Tiles of one shape form a group, which could be a single batched product. But the scores of a whole group would be written to
memory and read back three times: by the mask, by softmax and by the product with the values. So a group is worked off in
pieces whose scores stay in the processor's cache.

The backward pass is written by hand, because autograd would keep all probabilities, which are length x length again. It keeps
those of small tiles, which are cheap, and recomputes the others from queries and keys.

Inside, tensors are head-major, (heads, slots, head_dim): then a tile is a view, and the products need no copies of queries.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from modernenc.kernels.buckets import MULTIPLE, Buckets

SCORES_PER_THREAD = 1 << 20
"""About how many attention scores a thread works on at a time, so that they stay in its cache."""
MIN_HEADS = 2
"""At least this many heads per piece: oneDNN is five times slower at a product with one transposed matrix than with several."""
CAUSAL_QUERIES = 128
"""At most this many queries of a document at a time if they see no later keys: the fewer, the less is computed in vain."""
MAX_SAVED_KEYS = 512
"""Tiles with at most this many keys save their probabilities for the backward pass; larger ones recompute them."""


@dataclass(frozen=True)
class TileGroup:
    """Equally shaped tiles side by side."""

    start: int
    """Slot of the first query."""
    count: int
    """Number of tiles."""
    queries: int
    keys: int
    mask: Float[Tensor, "count _ last_keys"] | None
    """Additive mask for the last keys of each tile: 0 where a query may see one, the dtype's minimum elsewhere. Keys before
    those are visible to all queries; None means that all keys are."""
    causal: bool = False
    """Whether queries see no key after their own. The mask is then that of any range of queries and as many keys, the last
    ones that it takes."""

    def query_view(self, x: Float[Tensor, "heads slots head_dim"]) -> Float[Tensor, "heads count queries head_dim"]:
        """View the query ranges of all tiles."""
        return x[:, self.start : self.start + self.count * self.queries].unflatten(1, (self.count, self.queries))

    def key_view(self, x: Float[Tensor, "heads slots head_dim"]) -> Float[Tensor, "heads count keys head_dim"]:
        """View the key ranges of all tiles, which overlap if `keys > queries`; `x` has a margin for the first and the last."""
        end = self.start + (self.count - 1) * self.queries + self.keys
        return x[:, self.start : end].unfold(1, self.keys, self.queries).transpose(2, 3)

    def add_to_keys(
        self, x: Float[Tensor, "heads slots head_dim"], tiles: Float[Tensor, "heads some keys head_dim"], first: int
    ) -> None:
        """Add the values of some tiles, the `first` one and those after it, to the key slots of `x`.

        Ranges of neighbouring tiles overlap, so the tiles are added in strips of `queries` keys, which do not.
        """
        for number, strip in enumerate(tiles.split(self.queries, dim=2)):
            start = self.start + (first + number) * self.queries
            x[:, start : start + tiles.shape[1] * self.queries] += strip.flatten(1, 2)

    def pieces(self, heads: int, scores: int) -> Iterator[tuple[slice, slice, list[slice]]]:
        """Cut the group into pieces of about `scores` attention scores: ranges of heads, of tiles, and of queries in a tile."""
        tile_scores = self.queries * self.keys
        head_groups = max(1, min(ceil(heads * tile_scores / scores), heads // MIN_HEADS))
        some_heads = ceil(heads / head_groups)
        some_tiles = max(1, scores // (some_heads * tile_scores))
        rows = MULTIPLE * ceil(self.queries / ceil(some_heads * tile_scores / scores) / MULTIPLE)
        rows = min(rows, CAUSAL_QUERIES) if self.causal else rows
        ranges = [slice(first, min(first + rows, self.queries)) for first in range(0, self.queries, rows)]
        for head in range(0, heads, some_heads):
            for first in range(0, self.count, some_tiles):
                yield slice(head, head + some_heads), slice(first, first + some_tiles), ranges

    def seen_by(self, queries: slice) -> slice:
        """Return the keys that a range of queries takes."""
        return slice(queries.stop) if self.causal else slice(None)

    def probs(self, q: Tensor, k: Tensor, tiles: slice, queries: slice) -> Tensor:
        """Compute the attention probabilities of a range of queries, in some tiles, over the keys that it takes."""
        scores = q @ k.transpose(1, 2)
        if self.mask is not None:
            rows = queries.stop - queries.start
            some = self.mask[:, :rows, :rows] if self.causal else self.mask[tiles]
            if not self.causal and some.shape[1] > 1:
                some = some[:, queries]
            scores.unflatten(0, (-1, len(some)))[..., -some.shape[-1] :].add_(some)
        return scores.softmax(-1)


@dataclass(frozen=True)
class TileLayout:
    """Where the tokens of a batch lie, and the tiles over them."""

    groups: list[TileGroup]
    slots: int
    """Slots of queries, at least as many as there are tokens."""
    margin: int
    """Empty slots that keys have before and after those."""
    index: Int[Tensor, " filled"] | None
    """The token in each of the first slots; None if tokens lie in their own order."""
    inverse: Int[Tensor, " tokens"] | None
    """The slot of each token."""

    @classmethod
    def of_documents(cls, lengths: list[int], dtype: torch.dtype, device: torch.device, causal: bool = False) -> "TileLayout":
        """Lay out whole documents, in buckets of similar length."""
        buckets = Buckets(lengths, device)
        groups, start = [], 0
        for valid, shortest in zip(buckets.valid, buckets.shortest, strict=True):
            count, length = valid.shape
            if causal:  # padding comes after all tokens, which so do not see it
                some = min(length, CAUSAL_QUERIES)
                mask = _make_additive_mask(torch.ones(1, some, some, dtype=torch.bool, device=device).tril_(), dtype)
            else:
                mask = None if shortest == length else _make_additive_mask(valid[:, None, shortest:], dtype)
            groups.append(TileGroup(start, count, length, length, mask, causal))
            start += count * length
        return cls(groups, start, 0, buckets.index, buckets.inverse)

    @classmethod
    def of_windows(cls, documents: Int[Tensor, " tokens"], half: int, dtype: torch.dtype, causal: bool = False) -> "TileLayout":
        """Lay out query ranges of `half` a window, whose keys reach as far again to both sides, given each token's document.

        If `causal`, they reach to the left alone.
        """
        device = documents.device
        documents = F.pad(documents, (0, -len(documents) % half), value=-1)  # queries beyond the last token
        right = 0 if causal else half
        width = 2 * half + right
        keys = F.pad(documents, (half, right), value=-2).unfold(0, width, half)[:, None, :]
        distance = torch.arange(half, device=device)[:, None] + half - torch.arange(width, device=device)  # to the left
        seen = (documents.view(-1, half, 1) == keys) & (distance <= half) & (distance >= -right)
        group = TileGroup(0, len(seen), half, width, _make_additive_mask(seen, dtype))
        return cls([group], len(documents), half, None, None)


def tiled_attention(
    qkv: Float[Tensor, "tokens 3 heads head_dim"],
    cos: Float[Tensor, "tokens half"],
    sin: Float[Tensor, "tokens half"],
    layout: TileLayout,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Rotate queries and keys by the given cosines and sines, and attend within the tiles of `layout`."""
    out = _TiledAttention.apply(qkv, cos, sin, layout)
    assert isinstance(out, Tensor)
    return out


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, layout: TileLayout) -> Tensor:
        index, inverse = layout.index, layout.inverse
        # Autocast would take softmax to fp32 and back, at three times the cost.
        with torch.autocast(qkv.device.type, enabled=False):
            # 1. Tokens into slots, head-major, rotated on the way. Slots without a token must be finite: masked scores are
            #    multiplied by a probability of 0, and 0 x NaN would be NaN.
            packed, cos, sin = (x if index is None else x.index_select(0, index) for x in (qkv, cos, sin))
            _, _, heads, head_dim = packed.shape
            q = packed.new_empty(heads, layout.slots, head_dim)
            k, v = kv = packed.new_empty(2, heads, layout.slots + 2 * layout.margin, head_dim)
            inner = slice(layout.margin, layout.margin + len(packed))
            q[:, len(packed) :], kv[:, :, : inner.start], kv[:, :, inner.stop :] = 0, 0, 0
            rotate_queries, rotate_keys = _query_key_rotations(cos, sin, packed)
            sources = packed.permute(1, 2, 0, 3)
            rotate_queries(sources[0], q[:, : len(packed)])
            rotate_keys(sources[1], k[:, inner])
            v[:, inner] = sources[2]
            # 2. Piece by piece: scores, probabilities, and their product with the values.
            out = packed.new_empty(layout.slots, heads, head_dim)
            saved_probs: list[Tensor] = []
            # Saved, because the backward pass must cut the same pieces to find their probabilities in order.
            ctx.scores = SCORES_PER_THREAD * torch.get_num_threads()
            for group in layout.groups:
                queries, keys, values = group.query_view(q), group.key_view(k), group.key_view(v)
                outs = group.query_view(out.transpose(0, 1))
                for h, n, ranges in group.pieces(heads, ctx.scores):
                    k_tiles, v_tiles = keys[h, n].flatten(0, 1).contiguous(), values[h, n].flatten(0, 1).contiguous()
                    for r in ranges:
                        q_tiles, seen = queries[h, n, r], group.seen_by(r)
                        probs = group.probs(q_tiles.flatten(0, 1), k_tiles[:, seen], n, r)
                        outs[h, n, r] = (probs @ v_tiles[:, seen]).view(q_tiles.shape)
                        if group.keys <= MAX_SAVED_KEYS and any(ctx.needs_input_grad):
                            saved_probs.append(probs)
            ctx.save_for_backward(q, k, v, cos, sin, *saved_probs)
            ctx.layout = layout
            return out[: len(qkv)] if inverse is None else out.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        q, k, v, cos, sin, *rest = ctx.saved_tensors
        saved_probs = iter(rest)
        layout: TileLayout = ctx.layout
        inverse, filled = layout.inverse, len(cos)
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            grad = q.new_zeros(layout.slots, len(q), q.shape[2])
            if inverse is None:
                grad[:filled] = grads[0]
            else:
                grad.index_copy_(0, inverse, grads[0])
            # With P = softmax(S), S = Q K^T and O = P V, and dX for the gradient of X:
            #   dP = dO V^T,  dS = softmax backward(dP, P),  dQ = dS K,  dK = dS^T Q,  dV = P^T dO.
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for group in layout.groups:
                queries, keys, values = group.query_view(q), group.key_view(k), group.key_view(v)
                out_grads, dqueries = group.query_view(grad.transpose(0, 1)), group.query_view(dq)
                for h, n, ranges in group.pieces(len(q), ctx.scores):
                    k_tiles, v_tiles = keys[h, n].flatten(0, 1).contiguous(), values[h, n].flatten(0, 1).contiguous()
                    sums: list[Tensor] = []  # dK and dV of these tiles, over all ranges of their queries
                    for r in ranges:
                        q_tiles, out_grad = queries[h, n, r].flatten(0, 1), out_grads[h, n, r].flatten(0, 1)
                        seen = group.seen_by(r)
                        if group.keys <= MAX_SAVED_KEYS:
                            probs = next(saved_probs)
                        else:
                            probs = group.probs(q_tiles, k_tiles[:, seen], n, r)
                        dprobs = out_grad @ v_tiles[:, seen].transpose(1, 2)
                        dscores = torch.ops.aten._softmax_backward_data(dprobs, probs, -1, probs.dtype)
                        dqueries[h, n, r] = (dscores @ k_tiles[:, seen]).view(queries[h, n, r].shape)
                        parts = dscores.transpose(1, 2) @ q_tiles, probs.transpose(1, 2) @ out_grad
                        if len(ranges) == 1:
                            sums = list(parts)
                            break
                        # Many bf16 terms are summed in fp32, or the sum would lose too much.
                        sums = sums or [torch.zeros_like(x, dtype=wide) for x in (k_tiles, v_tiles)]
                        for total, part in zip(sums, parts, strict=True):
                            total[:, seen].add_(part)
                    for x, total in zip((dk, dv), sums, strict=True):
                        group.add_to_keys(x[h], total.view(keys[h, n].shape), n.start)
            # Back from slots to tokens. The gradient of a rotation is the inverse rotation.
            inner = slice(layout.margin, layout.margin + filled)
            dqkv = q.new_empty(filled, 3, len(q), q.shape[2])
            targets = dqkv.permute(1, 2, 0, 3)
            unrotate_queries, unrotate_keys = _query_key_rotations(cos, -sin, q)
            unrotate_queries(dq[:, :filled], targets[0])
            unrotate_keys(dk[:, inner], targets[1])
            targets[2].copy_(dv[:, inner])
            return dqkv if inverse is None else dqkv.index_select(0, inverse), None, None, None


def _make_additive_mask(seen: Bool[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Turn a mask of what is seen into one to add to scores."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _query_key_rotations(cos: Tensor, sin: Tensor, like: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return functions that rotate queries, and scale them by 1/sqrt(head_dim), and keys, in the precision of `like`."""
    wide, scale = torch.promote_types(like.dtype, cos.dtype), like.shape[-1] ** -0.5
    scaled = (cos.to(wide) * scale).to(like.dtype), (sin.to(wide) * scale).to(like.dtype)
    plain = cos.to(like.dtype), sin.to(like.dtype)
    return (lambda x, out: _rotate_into(out, x, *scaled)), (lambda x, out: _rotate_into(out, x, *plain))


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Write into `out` the result of `modernenc.backbones.rotary.rotate`, without temporaries."""
    (a, b), (first, second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
