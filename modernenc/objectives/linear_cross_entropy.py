"""Cross-entropy of a linear map onto the vocabulary, a chunk of rows at a time, so that all logits never exist at once."""

from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from modernenc.backbones.transfer import on_gpu

HAS_KERNEL = bool(find_spec("triton"))
ROWS = 1_024
"""Rows of a chunk: enough that adding the chunk's share to the gradient of the weight costs little beside its products."""
CACHED = 1 << 21
"""Logits that are worked on at a time, about: few enough to stay in a processor's cache."""


def linear_cross_entropy(
    hidden: Float[Tensor, "rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"],
    targets: Int[Tensor, " targets"],
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Of the first rows of `hidden`: the loss summed over the targets, in nats, and how many of these are predicted.

    Products are in the precision of autocast, the loss and the sums over chunks in fp32 at least. Gradients are made along with
    the loss, so `backward` may run once only.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        loss, correct = _LinearCrossEntropy.apply(hidden.to(dtype), weight, bias, targets)
    return loss, correct


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        weights, shift = weight.to(hidden.dtype), bias.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss, correct = hidden.new_zeros((), dtype=wide), targets.new_zeros(())
        hidden_grad, bias_grad = torch.empty_like(hidden), torch.zeros_like(bias)
        weight_grad: Tensor | None = None
        logits = hidden.new_empty(min(ROWS, len(hidden)), len(weight))
        for start in range(0, len(hidden), ROWS):
            rows, wanted = hidden[start : start + ROWS], targets[start : start + ROWS]
            torch.addmm(shift, rows, weights.t(), out=logits[: len(rows)])
            losses, hits = _to_gradients(logits[: len(rows)], wanted, bias_grad)
            loss, correct = loss + losses, correct + hits
            if any(ctx.needs_input_grad):
                torch.mm(logits[: len(rows)], weights, out=hidden_grad[start : start + ROWS])
                share = logits[: len(rows)].t() @ rows
                weight_grad = share.to(weight.dtype) if weight_grad is None else weight_grad.add_(share)
        if any(ctx.needs_input_grad):
            ctx.grads = hidden_grad, torch.zeros_like(weight) if weight_grad is None else weight_grad, bias_grad
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        if not hasattr(ctx, "grads"):
            raise RuntimeError("the gradients of linear_cross_entropy were handed out already")
        hidden, weight, bias = (made.mul_(grads[0]) for made in ctx.grads)
        del ctx.grads
        return hidden, weight, bias, None


def _to_gradients(logits: Tensor, targets: Tensor, bias_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and number of right answers; the logits become their gradients, those of rows without a target zero."""
    loss, correct = bias_grad.new_zeros(()), targets.new_zeros(())
    logits[len(targets) :] = 0
    if on_gpu(logits.device) and bias_grad.dtype == torch.float32 and HAS_KERNEL:
        from modernenc.objectives.cross_entropy import to_gradients

        losses, best = to_gradients(logits[: len(targets)], targets)
        bias_grad += logits.sum(0, dtype=bias_grad.dtype)
        return losses.sum(), (best == targets).sum()
    at_once = max(1, CACHED // logits.shape[1])
    for rows, wanted in zip(logits[: len(targets)].split(at_once), targets[:, None].split(at_once), strict=True):
        (highest, best), right = rows.max(1, keepdim=True), rows.gather(1, wanted)
        shares = rows.softmax(1, dtype=bias_grad.dtype)
        # The highest share is never too small for a logarithm.
        losses = highest - shares.amax(1, keepdim=True).log() - right
        shares.scatter_(1, wanted, torch.expm1(-losses))
        bias_grad += shares.sum(0)
        rows.copy_(shares)
        loss, correct = loss + losses.sum(), correct + (best == wanted).sum()
    return loss, correct
