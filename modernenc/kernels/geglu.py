"""`gelu(a) * b` with a and b side by side in one tensor, the result of one matrix product.

On a GPU a Triton kernel reads and writes each number once, forward and backward: torch's compiler makes a kernel of its own for
putting the gradients of the two halves side by side, and takes twice the time that the bytes need. Here is the way for any
device.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from modernenc.kernels.device import use_gpu_kernels

KERNEL = f"{__package__}.geglu_triton"
HAS_KERNEL = bool(find_spec("triton"))  # a constant, since torch's compiler cannot trace find_spec


def geglu(x: Float[Tensor, "tokens width_2"]) -> Float[Tensor, "tokens width"]:
    """Return the GELU of the first half of each row times the second half."""
    if use_gpu_kernels(x.device) and HAS_KERNEL:
        return fused_geglu(x)
    value, gate = x.chunk(2, dim=-1)
    return F.gelu(value) * gate


@torch.library.custom_op("modernenc::geglu", mutates_args=())
def fused_geglu(x: Tensor) -> Tensor:
    """Return the same by the kernel."""
    return import_module(KERNEL).forward(x)


@torch.library.custom_op("modernenc::geglu_backward", mutates_args=())
def fused_geglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x by the kernel."""
    return import_module(KERNEL).backward(grad.contiguous(), x.contiguous())


@fused_geglu.register_fake
def _(x: Tensor) -> Tensor:
    """Tell torch the shape of the result when the operator is traced."""
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@fused_geglu_backward.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    """Tell torch the shape of the result when the operator is traced."""
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    return fused_geglu_backward(grad, *ctx.saved_tensors)


fused_geglu.register_autograd(_differentiate, setup_context=_save)
