"""Initial weights of MEGA."""

from torch import Tensor, nn

INIT_STD = 0.02
"""Standard deviation of every matrix that has no other."""


def normal_(weight: Tensor, std: float = INIT_STD) -> None:
    """Fill a weight; not on the meta device, where torch would import its compiler for that, in seconds."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)
