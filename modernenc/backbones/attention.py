"""Attention within documents laid end to end: one signature, three paths with equal results.

- `flash`: flash-attn's varlen kernel, when installed, on CUDA in half precision.
- `varlen`: `torch.nn.attention.varlen`, on CUDA in half precision.
- `blocks`: any device and precision. A window costs blocks of twice its size, never length x length; without a window,
  documents of similar length are batched.

Which one is used depends on device and precision alone, and `path_for` names it.
"""

import importlib.util
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from modernenc.backbones.buckets import EXPLICIT_UP_TO, Buckets

_HALF = (torch.float16, torch.bfloat16)


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
    outs = []
    for part, valid in zip(buckets.gather(torch.stack(qkv, dim=1)), buckets.valid, strict=True):
        q, k, v = part.permute(2, 0, 3, 1, 4)  # each (docs, heads, length, head_dim)
        bias = _bias(valid[:, None, None, :], q.dtype)
        if q.shape[2] <= EXPLICIT_UP_TO:
            out = _softmax_attention(q, k, v, bias)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bool(valid.all()) else bias)
        outs.append(out.transpose(1, 2))
    return buckets.scatter(outs)


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
