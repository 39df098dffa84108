"""GeGLU, forward and backward, as two Triton kernels; `geglu` says what is computed."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1_024
"""Results that a program computes."""


def forward(x: Tensor) -> Tensor:
    """Return gelu of the first half of each row of `x` times the second half, computed in fp32."""
    out = x.new_empty(len(x), x.shape[1] // 2)
    _launch(_forward, out.numel(), x.contiguous(), out, out.shape[1])
    return out


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of `x`, given that of the result; both are contiguous."""
    x_grad = torch.empty_like(x)
    _launch(_backward, grad.numel(), grad, x, x_grad, grad.shape[1])
    return x_grad


def _launch(kernel: Any, results: int, *arguments: Any) -> None:
    if results:
        kernel[triton.cdiv(results, TILE),](*arguments, results, TILE=TILE)


@triton.jit
def _normal_distribution(x):
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))  # sqrt(1/2)


@triton.jit
def _forward(x, out, width, results, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = place < results
    first = place + place // width * width  # rows of x are twice as long as those of the result
    a = tl.load(x + first, there, 0.0).to(tl.float32)
    b = tl.load(x + first + width, there, 0.0).to(tl.float32)
    tl.store(out + place, a * _normal_distribution(a) * b, there)


@triton.jit
def _backward(grad, x, x_grad, width, results, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = place < results
    first = place + place // width * width
    incoming = tl.load(grad + place, there, 0.0).to(tl.float32)
    a = tl.load(x + first, there, 0.0).to(tl.float32)
    b = tl.load(x + first + width, there, 0.0).to(tl.float32)
    distribution = _normal_distribution(a)
    density = 0.3989422804014327 * tl.exp(-0.5 * a * a)  # 1 / sqrt(2 pi)
    tl.store(x_grad + first, incoming * b * (distribution + a * density), there)
    tl.store(x_grad + first + width, incoming * a * distribution, there)
