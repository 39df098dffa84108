"""Initial weights, drawn in a way that is the same in all versions of torch, so that one seed is one model.

Normal and uniform numbers are; `nn.init.trunc_normal_` draws differently in torch 2.11 and 2.14.
"""

import torch
from torch import Tensor, nn

INIT_STD = 0.02
"""Standard deviation of every matrix that states no other, as published for ModernBERT and MEGA."""


def normal_(weight: Tensor, std: float = INIT_STD) -> None:
    """Fill a weight with normal numbers. A meta tensor is left alone: torch would import its compiler for it, in seconds."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


@torch.no_grad()
def truncated_normal_(weight: Tensor, std: float) -> None:
    """Fill a weight with normal numbers, redrawing those beyond two standard deviations. A meta tensor is left alone."""
    if weight.is_meta:
        return
    nn.init.normal_(weight)
    while (far := weight.abs() > 2).any():
        weight[far] = torch.randn(int(far.sum()), dtype=weight.dtype, device=weight.device)
    weight.mul_(std)
