"""Attention within packed documents: one signature, three backends with equal results.

- `flash`: flash-attn's variable-length kernel, on CUDA in half precision where the package is installed.
- `varlen`: `torch.nn.attention.varlen`, on CUDA in half precision.
- `tiled`: plain matrix products, on any device and in any precision (`modernenc.kernels.tiled_attention`).

Device, precision and whether flash-attn is installed decide which one is used; `select_backend` names it.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from modernenc.backbones.rotary import Rotation, rotate
from modernenc.kernels.device import lengths_of, to_device, use_gpu_kernels
from modernenc.kernels.tiled_attention import TileLayout, tiled_attention

_HALF = (torch.float16, torch.bfloat16)
_HAS_FLASH = importlib.util.find_spec("flash_attn") is not None  # a constant, since torch's compiler cannot trace find_spec


class VarlenInfo:
    """The ends of packed documents on the device of the tokens, and what the backends derive from them once per batch."""

    def __init__(self, cu_seqlens: Int[Tensor, " docs_plus_1"], max_seqlen: int, tokens: int, device: torch.device) -> None:
        self.cu_seqlens = cu_seqlens if cu_seqlens.device == device else to_device(cu_seqlens.numpy(), device)
        self.max_seqlen = max_seqlen
        self.tokens = tokens
        self._on_cpu = cu_seqlens
        self._tiles: dict[tuple[int | None, torch.dtype], TileLayout] = {}

    def tiles(self, half_window: int | None, dtype: torch.dtype) -> TileLayout:
        """Return the tiles of the `tiled` backend, which all layers with the same window share."""
        if (half_window, dtype) not in self._tiles:
            if half_window is None:
                tiles = TileLayout.of_documents(lengths_of(self._on_cpu), dtype, self.cu_seqlens.device)
            else:
                tiles = TileLayout.of_windows(self.cu_seqlens, self.tokens, half_window, dtype)
            self._tiles[half_window, dtype] = tiles
        return self._tiles[half_window, dtype]


def select_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the backend that `attention` takes on this device and in this precision."""
    if not use_gpu_kernels(device) or dtype not in _HALF:
        return "tiled"
    return "flash" if _HAS_FLASH else "varlen"


QKV = Float[Tensor, "tokens 3 heads head_dim"]
Attended = Float[Tensor, "tokens heads head_dim"]


def attention(qkv: QKV, rotation: Rotation, varlen_info: VarlenInfo, half_window: int | None) -> Attended:
    """Rotate queries and keys, then attend within each document, `half_window` tokens to each side, or everywhere if None."""
    return BACKENDS[select_backend(qkv.device, qkv.dtype)](qkv, rotation, varlen_info, half_window)


def kernels() -> list[Any]:
    """Return the operators of the backends for a GPU, as far as torch knows them."""
    import torch.nn.attention.varlen  # defines the operator

    return [torch.ops.torch_attn._varlen_attn.default]


def flash(qkv: QKV, rotation: Rotation, varlen_info: VarlenInfo, half_window: int | None) -> Attended:
    """Compute attention by flash-attn's kernel: Dao 2023, arXiv:2307.08691."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    strict = torch.are_deterministic_algorithms_enabled()  # torch's own kernels look at this themselves
    return _call_kernel(flash_attn_varlen_func, qkv, rotation, varlen_info, half_window, deterministic=strict)


def varlen(qkv: QKV, rotation: Rotation, varlen_info: VarlenInfo, half_window: int | None) -> Attended:
    """Compute attention by the kernel that comes with torch."""
    from torch.nn.attention.varlen import varlen_attn

    return _call_kernel(varlen_attn, qkv, rotation, varlen_info, half_window)


def tiled(qkv: QKV, rotation: Rotation, varlen_info: VarlenInfo, half_window: int | None) -> Attended:
    """Compute attention by plain matrix products."""
    return tiled_attention(qkv, rotation.cos, rotation.sin, varlen_info.tiles(half_window, qkv.dtype))


BACKENDS = {"flash": flash, "varlen": varlen, "tiled": tiled}


def _call_kernel(
    kernel: Callable[..., Any], qkv: QKV, rotation: Rotation, varlen_info: VarlenInfo, half_window: int | None, **settings: bool
) -> Attended:
    q, k, v = qkv.unbind(1)
    ends, longest = varlen_info.cu_seqlens, varlen_info.max_seqlen
    sides = (-1, -1) if half_window is None else (half_window, half_window)
    q, k = rotate(q, rotation), rotate(k, rotation)
    return kernel(q, k, v, ends, ends, longest, longest, window_size=sides, **settings)
