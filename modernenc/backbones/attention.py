"""Attention within documents laid end to end: one signature, three paths with equal results.

- `flash`: flash-attn's varlen kernel, when installed, on CUDA in half precision.
- `varlen`: `torch.nn.attention.varlen`, on CUDA in half precision.
- `blocks`: any device and precision. A window costs blocks of twice its size, never length x length; without a window,
  documents of similar length are batched.

Which one is used depends on device and precision alone, and `path_for` names it.
"""

import importlib.util
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_EXPLICIT_UP_TO = 512
# Up to this document length plain matrix products beat CPU SDPA, whose backward is slow on small blocks; beyond it their
# length x length scores would not be worth the memory.


class Layout:
    """Where documents begin and end, and what the attention paths derive from it, once per batch."""

    def __init__(self, cu_seqlens: Int[Tensor, " docs_plus_1"], max_seqlen: int, tokens: int) -> None:
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.tokens = tokens
        self._windows: dict[tuple[int, torch.dtype], Tensor] = {}

    @cached_property
    def documents(self) -> Int[Tensor, " tokens"]:
        """Number of each token's document."""
        lengths = self.cu_seqlens.diff()
        numbers = torch.arange(len(lengths), device=lengths.device)
        return torch.repeat_interleave(numbers, lengths, output_size=self.tokens)

    def window_bias(self, window: int, dtype: torch.dtype) -> Float[Tensor, "blocks 1 queries keys"]:
        """0 where a query may see a key, the lowest number where not.

        Queries come in blocks of 2 x window, keys from one window before their block to one after.
        """
        if (window, dtype) not in self._windows:
            block = 2 * window
            padded = F.pad(self.documents, (0, -self.tokens % block), value=-1)
            keys = _with_neighbours(padded.view(-1, block, 1), window, fill=-2).view(-1, 1, 1, 2 * block)
            queries = padded.view(-1, 1, block, 1)
            device = padded.device
            distance = torch.arange(block, device=device)[:, None] + window - torch.arange(2 * block, device=device)
            seen = (queries == keys) & (distance.abs() <= window)
            self._windows[window, dtype] = _bias(seen, dtype)
        return self._windows[window, dtype]

    @cached_property
    def buckets(self) -> "Buckets":
        """Documents grouped by length."""
        return Buckets(self.cu_seqlens)


class Buckets:
    """Documents of similar length side by side, padded to the longest of their bucket."""

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
        self.index: Int[Tensor, " padded"] = torch.cat(index)
        """Token at each place of all buckets; a document's last token again where it is over."""
        flat = torch.cat([v.flatten() for v in valid])
        places = flat.nonzero().flatten()
        self.inverse: Int[Tensor, " tokens"] = torch.empty_like(places)
        self.inverse[self.index[places]] = places


class _Rearrange(torch.autograd.Function):
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


class _Spread(torch.autograd.Function):
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


class QKV(NamedTuple):
    """Queries, keys and values of all tokens."""

    q: Float[Tensor, "tokens heads head_dim"]
    k: Float[Tensor, "tokens heads head_dim"]
    v: Float[Tensor, "tokens heads head_dim"]


def path_for(device: torch.device, dtype: torch.dtype) -> str:
    """The path that `attention` takes on this device in this precision."""
    if device.type != "cuda" or dtype not in _HALF:
        return "blocks"
    return "flash" if importlib.util.find_spec("flash_attn") else "varlen"


def attention(qkv: QKV, layout: Layout, window: int | None) -> Float[Tensor, "tokens heads head_dim"]:
    """Softmax attention of each token over its document, or over `window` tokens to each side and itself."""
    return PATHS[path_for(qkv.q.device, qkv.q.dtype)](qkv, layout, window)


def flash(qkv: QKV, layout: Layout, window: int | None) -> Float[Tensor, "tokens heads head_dim"]:
    """The flash-attn kernel."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    ends, longest = layout.cu_seqlens, layout.max_seqlen
    sides = (-1, -1) if window is None else (window, window)
    strict = torch.are_deterministic_algorithms_enabled()  # torch's own kernels ask by themselves
    return flash_attn_varlen_func(*qkv, ends, ends, longest, longest, window_size=sides, deterministic=strict)


def varlen(qkv: QKV, layout: Layout, window: int | None) -> Float[Tensor, "tokens heads head_dim"]:
    """The kernel that torch brings."""
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = layout.cu_seqlens, layout.max_seqlen
    sides = (-1, -1) if window is None else (window, window)
    out = varlen_attn(*qkv, ends, ends, longest, longest, window_size=sides)
    assert isinstance(out, Tensor)
    return out


def blocks(qkv: QKV, layout: Layout, window: int | None) -> Float[Tensor, "tokens heads head_dim"]:
    """The path for any device."""
    # Autocast would take softmax to fp32 and back, for three times the cost.
    with torch.autocast(qkv.q.device.type, enabled=False):
        return _global(qkv, layout) if window is None else _local(qkv, layout, window)


PATHS = {"flash": flash, "varlen": varlen, "blocks": blocks}


def _local(qkv: QKV, layout: Layout, window: int) -> Tensor:
    block = 2 * window
    fill = -layout.tokens % block
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, fill)).unflatten(0, (-1, block)) for x in qkv)  # (blocks, 2w, heads, head_dim)
    q = q.transpose(1, 2)
    k, v = (_with_neighbours(x, window, fill=0).transpose(1, 2) for x in (k, v))  # (blocks, heads, 4w, head_dim)
    out = _softmax_attention(q, k, v, layout.window_bias(window, q.dtype))
    return out.transpose(1, 2).flatten(0, 1)[: layout.tokens]


def _global(qkv: QKV, layout: Layout) -> Tensor:
    buckets = layout.buckets
    packed = torch.stack(qkv, dim=1)  # (tokens, 3, heads, head_dim)
    padded = _Rearrange.apply(packed, buckets.index, buckets.inverse)
    assert isinstance(padded, Tensor)
    outs = []
    parts = padded.split([docs * length for docs, length in buckets.shapes])
    for part, (docs, length), valid in zip(parts, buckets.shapes, buckets.valid, strict=True):
        q, k, v = part.view(docs, length, *part.shape[1:]).permute(2, 0, 3, 1, 4)  # each (docs, heads, length, head_dim)
        bias = _bias(valid[:, None, None, :], q.dtype)
        if length <= _EXPLICIT_UP_TO:
            out = _softmax_attention(q, k, v, bias)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bool(valid.all()) else bias)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    out = _Spread.apply(torch.cat(outs), buckets.index, buckets.inverse)
    assert isinstance(out, Tensor)
    return out


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias
    return scores.softmax(-1) @ v


def _with_neighbours(x: Tensor, window: int, fill: int) -> Tensor:
    """Each block with the last `window` entries of the block before and the first of the block after, along dim 1."""
    edge = x.new_full((1, window, *x.shape[2:]), fill)
    before = torch.cat((edge, x[:-1, -window:]))
    after = torch.cat((x[1:, :window], edge))
    return torch.cat((before, x, after), dim=1)


def _bias(seen: Bool[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _bucket_length(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, ...; a long document keeps its own length, since padding it would cost the most."""
    if length > _EXPLICIT_UP_TO:
        return length
    power = max(16, 1 << (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 16 else power
