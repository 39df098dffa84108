"""Logits to losses and gradients in one Triton kernel, which reads each logit twice and writes it once."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_COLUMNS = 4_096
"""Logits that a program loads at a time."""


@torch.library.custom_op("modernenc::to_gradients", mutates_args={"logits"})
def to_gradients(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each row and its first highest logit; overwrite the logits by the gradient of their loss.

    `logits` are (rows, vocab); the others have one number per row.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    best = torch.empty_like(targets)
    kernel: Any = _to_gradients[len(logits),]
    kernel(logits, logits.stride(0), logits.shape[1], targets, losses, best, COLUMNS=TILE_COLUMNS)
    return losses, best


@to_gradients.register_fake
def _(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Tell torch the shapes of the results when the operator is traced."""
    return torch.empty_like(targets, dtype=torch.float32), torch.empty_like(targets)


@triton.jit
def _to_gradients(logits, stride, vocab, targets, losses, best, COLUMNS: tl.constexpr):
    """Cross-entropy of one row of logits per program instance: one pass sums exponentials online, another writes gradients."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    place = tl.zeros([], tl.int64)
    for first in range(0, vocab, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        some = tl.load(logits + column, column < vocab, float("-inf")).to(tl.float32)
        top = tl.max(some, 0)
        place = tl.where(top > highest, first + tl.argmax(some, 0), place)
        higher = tl.maximum(highest, top)
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(some - higher), 0)
        highest = higher
    target_logit = tl.load(logits + target).to(tl.float32)
    tl.store(losses + row, highest + tl.log(total) - target_logit)
    tl.store(best + row, place)
    for first in range(0, vocab, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        some = tl.load(logits + column, column < vocab, float("-inf")).to(tl.float32)
        prob = tl.exp(some - highest) / total
        gradient = tl.where(column == target, prob - 1, prob)
        tl.store(logits + column, gradient, column < vocab)
