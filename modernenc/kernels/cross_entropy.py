"""Cross-entropy that turns logits into their gradients in place, so that neither probabilities nor losses are ever stored.

On a GPU a Triton kernel does it (`cross_entropy_triton`); here is the way for any device.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor

from modernenc.kernels.device import use_gpu_kernels

HAS_KERNEL = bool(find_spec("triton"))
CACHE_LOGITS = 1 << 21
"""About how many logits are worked on at a time, few enough to stay in a processor's cache."""


def logits_to_gradients(
    logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " targets"], bias_grad: Float[Tensor, " vocab"]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Overwrite logits by the gradients of their summed loss; return that loss and the number of correct predictions.

    Rows beyond the targets are padding: their gradients are 0. The column sums are added to `bias_grad`, whose precision is
    that of the loss. Among equal logits the first is the prediction, as in argmax.
    """
    loss, num_correct = bias_grad.new_zeros(()), targets.new_zeros(())
    logits[len(targets) :].zero_()
    if use_gpu_kernels(logits.device) and bias_grad.dtype == torch.float32 and HAS_KERNEL:
        kernel = import_module("modernenc.kernels.cross_entropy_triton")
        losses, best = kernel.to_gradients(logits[: len(targets)], targets)
        bias_grad += logits.sum(0, dtype=bias_grad.dtype)
        return losses.sum(), (best == targets).sum()
    chunk_rows = max(1, CACHE_LOGITS // logits.shape[1])
    for rows, wanted in zip(logits[: len(targets)].split(chunk_rows), targets[:, None].split(chunk_rows), strict=True):
        (highest, best), target_logit = rows.max(1, keepdim=True), rows.gather(1, wanted)
        probs = rows.softmax(1, dtype=bias_grad.dtype)
        # log(sum of exponentials) = highest - log(highest probability), and the highest one is never too small for a logarithm.
        losses = highest - probs.amax(1, keepdim=True).log() - target_logit
        probs.scatter_(1, wanted, torch.expm1(-losses))  # p - 1, exact even where p is next to 1
        bias_grad += probs.sum(0)
        rows.copy_(probs)
        loss, num_correct = loss + losses.sum(), num_correct + (best == wanted).sum()
    return loss, num_correct
