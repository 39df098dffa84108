"""Attention within documents laid end to end: one signature, three paths with equal results.

- `flash`: flash-attn's varlen kernel, when installed, on CUDA in half precision.
- `varlen`: `torch.nn.attention.varlen`, on CUDA in half precision.
- `blocks`: any device and precision. A window costs blocks of twice its size, never length x length; without a window,
  documents of similar length are batched.

Which one is used depends on device and precision alone, and `path_for` names it.
"""

import importlib.util

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from modernenc.backbones.block_attention import Arrangement, Blocks, block_attention
from modernenc.backbones.buckets import Buckets
from modernenc.backbones.rotary import Rotation, rotate
from modernenc.backbones.transfer import lengths_of, on_gpu, sent

_HALF = (torch.float16, torch.bfloat16)
_HAS_FLASH = importlib.util.find_spec("flash_attn") is not None  # not asked where it is used: the compiler cannot trace that


class Layout:
    """Where documents begin and end, and what the attention paths derive from it, once per batch."""

    def __init__(self, cu_seqlens: Int[Tensor, " docs_plus_1"], max_seqlen: int, tokens: int, device: torch.device) -> None:
        self.cu_seqlens = cu_seqlens if cu_seqlens.device == device else sent(cu_seqlens.numpy(), device)
        self.max_seqlen = max_seqlen
        self.tokens = tokens
        self._given = cu_seqlens
        self._arrangements: dict[tuple[int | None, torch.dtype], Arrangement] = {}

    def arrangement(self, window: int | None, dtype: torch.dtype) -> Arrangement:
        """Blocks of the tokens as they are for a window, of documents by length without one."""
        if (window, dtype) not in self._arrangements:
            made = self._by_document(dtype) if window is None else self._by_window(window, dtype)
            self._arrangements[window, dtype] = made
        return self._arrangements[window, dtype]

    def _by_document(self, dtype: torch.dtype) -> Arrangement:
        buckets = Buckets(lengths_of(self._given), self.cu_seqlens.device)
        blocks, start = [], 0
        for valid, shortest in zip(buckets.valid, buckets.shortest, strict=True):
            count, length = valid.shape
            bias = None if shortest == length else _bias(valid[:, None, shortest:], dtype)
            blocks.append(Blocks(start, count, length, length, bias))
            start += count * length
        if buckets.in_place:
            return Arrangement(blocks, start, 0, None, None)
        return Arrangement(blocks, start, 0, buckets.index, buckets.inverse)

    def _by_window(self, window: int, dtype: torch.dtype) -> Arrangement:
        """Queries in blocks as long as the window; keys from one window before their block to one after."""
        device, lengths = self.cu_seqlens.device, self.cu_seqlens.diff()
        numbers = torch.arange(len(lengths), device=device)
        documents = torch.repeat_interleave(numbers, lengths, output_size=self.tokens)
        documents = F.pad(documents, (0, -self.tokens % window), value=-1)
        keys = F.pad(documents, (window, window), value=-2).unfold(0, 3 * window, window)[:, None, :]
        distance = torch.arange(window, device=device)[:, None] + window - torch.arange(3 * window, device=device)
        seen = (documents.view(-1, window, 1) == keys) & (distance.abs() <= window)
        blocks = Blocks(0, len(seen), window, 3 * window, _bias(seen, dtype))
        return Arrangement([blocks], len(documents), window, None, None)


def path_for(device: torch.device, dtype: torch.dtype) -> str:
    """The path that `attention` takes on this device in this precision."""
    if not on_gpu(device) or dtype not in _HALF:
        return "blocks"
    return "flash" if _HAS_FLASH else "varlen"


def attention(
    qkv: Float[Tensor, "tokens 3 heads head_dim"], rotation: Rotation, layout: Layout, window: int | None
) -> Float[Tensor, "tokens heads head_dim"]:
    """Softmax attention with rotated queries and keys, over each document, or at most `window` tokens to each side."""
    return PATHS[path_for(qkv.device, qkv.dtype)](qkv, rotation, layout, window)


def flash(
    qkv: Float[Tensor, "tokens 3 heads head_dim"], rotation: Rotation, layout: Layout, window: int | None
) -> Float[Tensor, "tokens heads head_dim"]:
    """The flash-attn kernel."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    q, k, v = qkv.unbind(1)
    ends, longest = layout.cu_seqlens, layout.max_seqlen
    sides = (-1, -1) if window is None else (window, window)
    strict = torch.are_deterministic_algorithms_enabled()  # torch's own kernels ask by themselves
    q, k = rotate(q, rotation), rotate(k, rotation)
    return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, window_size=sides, deterministic=strict)


def varlen(
    qkv: Float[Tensor, "tokens 3 heads head_dim"], rotation: Rotation, layout: Layout, window: int | None
) -> Float[Tensor, "tokens heads head_dim"]:
    """The kernel that torch brings."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    ends, longest = layout.cu_seqlens, layout.max_seqlen
    sides = (-1, -1) if window is None else (window, window)
    out = varlen_attn(rotate(q, rotation), rotate(k, rotation), v, ends, ends, longest, longest, window_size=sides)
    assert isinstance(out, Tensor)
    return out


def blocks(
    qkv: Float[Tensor, "tokens 3 heads head_dim"], rotation: Rotation, layout: Layout, window: int | None
) -> Float[Tensor, "tokens heads head_dim"]:
    """The path for any device."""
    return block_attention(qkv, rotation, layout.arrangement(window, qkv.dtype))


PATHS = {"flash": flash, "varlen": varlen, "blocks": blocks}


def _bias(seen: Bool[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
