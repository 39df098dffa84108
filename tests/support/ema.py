"""MEGA's moving average by its definition."""

import torch
from torch import Tensor

from modernenc.backbones.ema import EMACoefficients
from modernenc.kernels.documents import Documents


def recurrence(x: Tensor, ema: EMACoefficients, documents: Documents) -> Tensor:
    """Follow the definition token by token, with alpha, beta and eta multiplied into one gain at the output."""
    change = ema.log_decay.expm1()  # q - 1, which keeps the bits that q next to 1 would lose
    outs = []
    for document in x.split(documents.lengths):
        sums = []
        for direction, tokens in enumerate((document, document.flip(0))):
            state, out = torch.zeros_like(change[direction]), []
            for token in tokens:
                state = state + (change[direction] * state + token[:, None])
                out.append((ema.gain[direction] * state).sum(-1))
            sums.append(torch.stack(out))
        outs.append(sums[0] + sums[1].flip(0))
    return torch.cat(outs)
