"""Queries, keys and values apart, and the first two rotated, on a GPU: one Triton kernel forward and one backward.

Forward, torch's compiler does as well. Backward, it adds up the gradients of three views of one tensor, and takes twice the
time that the bytes need; uncompiled, rotating takes as long as attention. `modernenc.backbones.rotary` says what a rotation is.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

KERNEL = f"{__package__}.rotation_triton"


@torch.library.custom_op("modernenc::rotate", mutates_args=())
def rotate_fused(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries, rotated keys and values, (tokens, heads, head_dim) each, given (tokens, 3, heads, head_dim)."""
    results = _empty_parts(qkv)
    import_module(KERNEL).rotate(qkv.unbind(1), results, cos, sin, sign=1)
    return results


@torch.library.custom_op("modernenc::rotate_backward", mutates_args=())
def rotate_fused_backward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of `qkv`, given those of the three results: they are rotated by the opposite angle."""
    qkv = _empty_whole(q)
    import_module(KERNEL).rotate([x.contiguous() for x in (q, k, v)], qkv.unbind(1), cos, sin, sign=-1)
    return qkv


@rotate_fused.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tell torch the shapes of the results when the operator is traced."""
    return _empty_parts(qkv)


@rotate_fused_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Tell torch the shape of the result when the operator is traced."""
    return _empty_whole(q)


def _empty_parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    q, k, v = (qkv.new_empty(tokens, heads, head_dim) for _ in range(3))
    return q, k, v


def _empty_whole(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], 3, *q.shape[1:])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None, None]:
    return rotate_fused_backward(q, k, v, *ctx.saved_tensors), None, None


rotate_fused.register_autograd(_differentiate, setup_context=_save)
