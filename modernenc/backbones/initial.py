"""Initial weights, drawn by what is the same in all versions of torch, so that one seed is one model.

Normal and uniform numbers are; `nn.init.trunc_normal_` draws others in torch 2.11 than in 2.14.
"""

import torch
from torch import Tensor, nn

INIT_STD = 0.02
"""Standard deviation of every matrix that has no other, as published for ModernBERT and MEGA."""


def normal_(weight: Tensor, std: float = INIT_STD) -> None:
    """Fill a weight; not on the meta device, where torch would import its compiler for that, in seconds."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


@torch.no_grad()
def truncated_normal_(weight: Tensor, std: float) -> None:
    """Fill a weight, drawing again what lies beyond two standard deviations; not on the meta device."""
    if weight.is_meta:
        return
    nn.init.normal_(weight)
    while (far := weight.abs() > 2).any():
        weight[far] = torch.randn(int(far.sum()), dtype=weight.dtype, device=weight.device)
    weight.mul_(std)
