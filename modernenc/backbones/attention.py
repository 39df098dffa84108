"""Attention within packed documents: one signature, four backends with equal results.

- `window`: a Triton kernel for a window, on CUDA in half precision (`modernenc.kernels.window_attention_triton`).
- `flash`: flash-attn's variable-length kernel, on CUDA in half precision where the package is installed.
- `varlen`: `torch.nn.attention.varlen`, on CUDA in half precision. It is FlashAttention 2, or 3 after `use_flash_attention_3`.
- `tiled`: plain matrix products, on any device and in any precision (`modernenc.kernels.tiled_attention`).

Device, precision, what is installed and, for `window`, a setting decide which one is used; `select_backend` names it.
"""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from modernenc.backbones.rotary import Rotation, rotate
from modernenc.kernels.device import lengths_of, to_device, use_gpu_kernels
from modernenc.kernels.rotation import rotate_fused
from modernenc.kernels.tiled_attention import TileLayout, tiled_attention

log = logging.getLogger("modernenc")

_HALF = (torch.float16, torch.bfloat16)
# Constants, and plain variables, since torch's compiler can trace neither find_spec nor a ContextVar.
_HAS_FLASH, _HAS_FLASH_3, _HAS_TRITON = (
    importlib.util.find_spec(package) is not None for package in ("flash_attn", "flash_attn_interface", "triton")
)
_window_kernel_on = False
_flash_3_active = False


def use_window_kernel(on: bool) -> None:
    """Let attention with a window take the `window` backend wherever it can, or not."""
    global _window_kernel_on
    _window_kernel_on = on


def use_flash_attention_3(device: torch.device) -> None:
    """Let torch's kernel be FlashAttention 3 on a Hopper GPU if its package is installed; it takes a window.

    FlashAttention 4, for Blackwell, is left alone: its backward pass in torch 2.11 refuses every call of `varlen`.
    """
    global _flash_3_active
    if _HAS_FLASH_3 and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        from torch.nn.attention import activate_flash_attention_impl

        try:
            activate_flash_attention_impl("FA3")
        except (ImportError, RuntimeError) as error:
            log.warning("FlashAttention 3 is installed, and cannot be used: %s", error)
        else:
            _flash_3_active = True


class VarlenInfo:
    """The ends of packed documents on the device of the tokens, and what the backends derive from them once per batch.

    If `causal`, no token sees those after it.
    """

    def __init__(
        self, cu_seqlens: Int[Tensor, " docs_plus_1"], max_seqlen: int, tokens: int, device: torch.device, causal: bool = False
    ) -> None:
        self.cu_seqlens = cu_seqlens if cu_seqlens.device == device else to_device(cu_seqlens.numpy(), device)
        self.max_seqlen = max_seqlen
        self.tokens = tokens
        self.causal = causal
        self._on_cpu = cu_seqlens
        self._tiles: dict[tuple[int | None, torch.dtype], TileLayout] = {}
        numbers = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32, device=device)
        # The document of each token: made here and not on demand, since then it would be in the graph of one layer alone.
        self.documents = torch.repeat_interleave(numbers, self.cu_seqlens.diff(), output_size=tokens)

    def reach(self, half_window: int | None) -> tuple[int, int]:
        """Return how many tokens before and after itself each token sees; -1 for all."""
        side = -1 if half_window is None else half_window
        return side, 0 if self.causal else side

    def tiles(self, half_window: int | None, dtype: torch.dtype) -> TileLayout:
        """Return the tiles of the `tiled` backend, which all layers with the same window share."""
        if (half_window, dtype) not in self._tiles:
            if half_window is None:
                tiles = TileLayout.of_documents(lengths_of(self._on_cpu), dtype, self.cu_seqlens.device, self.causal)
            else:
                tiles = TileLayout.of_windows(self.documents, half_window, dtype, self.causal)
            self._tiles[half_window, dtype] = tiles
        return self._tiles[half_window, dtype]


def select_backend(device: torch.device, dtype: torch.dtype, half_window: int | None) -> str:
    """Return the name of the backend that `attention` takes on this device, in this precision and with this window."""
    if not use_gpu_kernels(device) or dtype not in _HALF:
        return "tiled"
    if half_window is not None and _window_kernel_on and _HAS_TRITON:
        return "window"
    return "flash" if _HAS_FLASH and not _flash_3_active else "varlen"


def describe_backends(device: torch.device, dtype: torch.dtype) -> str:
    """Say for the log what layers take on this device and in this precision."""
    backend = select_backend(device, dtype, None)
    version = " (FlashAttention 3)" if backend == "varlen" and _flash_3_active else ""
    local = ", window kernel for local layers" if select_backend(device, dtype, 1) == "window" else ""
    return f"attention backend {backend}{version}{local}"


QKV = Float[Tensor, "tokens 3 heads head_dim"]
Attended = Float[Tensor, "tokens heads head_dim"]


def attention(qkv: QKV, rotation: Rotation, varlen_info: VarlenInfo, half_window: int | None) -> Attended:
    """Rotate queries and keys, then attend within each document, `half_window` tokens to each side, or everywhere if None."""
    return BACKENDS[select_backend(qkv.device, qkv.dtype, half_window)](qkv, rotation, varlen_info, half_window)


def kernels() -> list[Any]:
    """Return the operators of the backends for a GPU, as far as torch knows them."""
    import torch.nn.attention.varlen  # defines the operator

    operators = [torch.ops.torch_attn._varlen_attn.default]
    if _window_kernel_on and _HAS_TRITON:
        import modernenc.kernels.window_attention_triton  # noqa: F401  # as does this

        operators.append(torch.ops.modernenc.window_attention.default)
    return operators


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


def window(qkv: QKV, rotation: Rotation, varlen_info: VarlenInfo, half_window: int | None) -> Attended:
    """Compute attention with a window by the Triton kernel."""
    assert half_window is not None, "the kernel is for a window"
    from modernenc.kernels.window_attention_triton import window_attention

    out, _ = window_attention(qkv, rotation.cos, rotation.sin, varlen_info.documents, *varlen_info.reach(half_window))
    return out


BACKENDS = {"window": window, "flash": flash, "varlen": varlen, "tiled": tiled}


def _call_kernel(
    kernel: Callable[..., Any], qkv: QKV, rotation: Rotation, varlen_info: VarlenInfo, half_window: int | None, **settings: bool
) -> Attended:
    if use_gpu_kernels(qkv.device) and _HAS_TRITON:
        q, k, v = rotate_fused(qkv, rotation.cos, rotation.sin)
    else:
        q, k, v = qkv.unbind(1)
        q, k = rotate(q, rotation), rotate(k, rotation)
    ends, longest = varlen_info.cu_seqlens, varlen_info.max_seqlen
    return kernel(q, k, v, ends, ends, longest, longest, window_size=varlen_info.reach(half_window), **settings)
