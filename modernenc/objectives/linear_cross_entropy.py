"""Cross-entropy of a linear map onto the vocabulary, chunk by chunk, so that all logits never exist at once.

A batch of 16,384 predicted tokens over 50,368 ids is 3.3 GB of logits in fp32, and autograd keeps several such tensors. Instead
each chunk of rows is turned into its loss and its gradients at once, and its logits are overwritten by the next chunk's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from modernenc.kernels.cross_entropy import logits_to_gradients
from modernenc.kernels.device import use_gpu_kernels

CHUNK_ROWS, GPU_CHUNK_ROWS = 1_024, 4_096
"""Rows per chunk: enough that adding to the gradient of the weight costs little beside the chunk's matrix products, which take
a GPU less of the time. They never depend on the memory that is free, for then the bits would."""


def linear_cross_entropy(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"],
    targets: Int[Tensor, " targets"],
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Return the loss summed over the targets, in nats, and the number of correct predictions.

    Targets belong to the first rows of `hidden`; rows beyond them are padding. Products are in the precision of autocast, the
    loss and the sums over chunks in fp32 at least. Gradients are computed along with the loss, so `backward` may run only once.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        loss, num_correct = _LinearCrossEntropy.apply(hidden.to(dtype), weight, bias, targets)
    return loss, num_correct


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        weight_, bias_, vocab = weight.to(hidden.dtype), bias.to(hidden.dtype), len(weight)
        more = -vocab % 8 if use_gpu_kernels(hidden.device) else 0
        if more:  # a GPU has slow products for sizes that are no multiple of 8; these logits are never the highest
            weight_, bias_ = F.pad(weight_, (0, 0, 0, more)), F.pad(bias_, (0, more), value=torch.finfo(hidden.dtype).min)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss, num_correct = hidden.new_zeros((), dtype=wide), targets.new_zeros(())
        hidden_grad, bias_grad = torch.empty_like(hidden), bias.new_zeros(vocab + more)
        weight_grad: Tensor | None = None
        chunk = GPU_CHUNK_ROWS if use_gpu_kernels(hidden.device) else CHUNK_ROWS
        logits = hidden.new_empty(min(chunk, len(hidden)), vocab + more)  # one buffer for all chunks
        for start in range(0, len(hidden), chunk):
            rows, wanted = hidden[start : start + chunk], targets[start : start + chunk]
            torch.addmm(bias_, rows, weight_.t(), out=logits[: len(rows)])
            chunk_loss, chunk_correct = logits_to_gradients(logits[: len(rows)], wanted, bias_grad)
            loss, num_correct = loss + chunk_loss, num_correct + chunk_correct
            if any(ctx.needs_input_grad):  # the logits are their gradients now
                torch.mm(logits[: len(rows)], weight_, out=hidden_grad[start : start + chunk])
                part = logits[: len(rows)].t() @ rows
                weight_grad = part.to(weight.dtype) if weight_grad is None else weight_grad.add_(part)
        if any(ctx.needs_input_grad):
            weight_grad = torch.zeros_like(weight) if weight_grad is None else weight_grad[:vocab]
            ctx.grads = hidden_grad, weight_grad, bias_grad[:vocab]
        ctx.mark_non_differentiable(num_correct)
        return loss, num_correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        if not hasattr(ctx, "grads"):
            raise RuntimeError("the gradients of linear_cross_entropy were handed out already: backward may run only once")
        hidden, weight, bias = (grad.mul_(grads[0]) for grad in ctx.grads)  # in place: a copy would double the memory
        del ctx.grads
        return hidden, weight, bias, None
