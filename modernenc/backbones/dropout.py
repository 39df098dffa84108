"""Dropout whose random bits do not take as long as the matrix products around it."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import Float
from .transfer import on_gpu


class Dropout(nn.Module):
    """Zero a share `p` of the numbers, rounded to 1/65,536, and scale up the rest.

    On a CPU torch draws one number after the other, on one core: a tenth of a training step went into it. There numpy draws 16
    bits each, from a seed that it takes from torch's generator, so that what seeds that one seeds this.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a dropout of {p}: expected a share in [0, 1)")
        self.p = p

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu" or on_gpu(x.device):
            return F.dropout(x, self.p)
        seed = int(torch.randint(1 << 62, ()))
        words = np.random.SFC64(seed).random_raw(-(-x.numel() // 4))
        bits = torch.from_numpy(words.view(np.int16))[: x.numel()].view(x.shape)
        kept = bits >= round(self.p * 65_536) - 32_768
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))
