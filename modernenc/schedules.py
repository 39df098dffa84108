"""Learning-rate curves: the factor on a phase's peak learning rate from the end of its warmup to its own end.

Each is a function of the progress, in [0, 1], and of the factor that is left at the end of a decaying curve, in [0, 1].
"""

import math
from collections.abc import Callable


def constant(progress: float, final: float) -> float:
    """1 throughout."""
    return 1.0


def linear(progress: float, final: float) -> float:
    """`1 - (1 - final) progress`."""
    return 1 - (1 - final) * progress


def cosine(progress: float, final: float) -> float:
    """`final + (1 - final) (1 + cos(pi progress)) / 2`: Loshchilov and Hutter 2016, arXiv:1608.03983, equation 5."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def one_minus_sqrt(progress: float, final: float) -> float:
    """`final + (1 - final) (1 - sqrt(progress))`: Hägele et al. 2024, arXiv:2405.18392, section 3."""
    return final + (1 - final) * (1 - math.sqrt(progress))


LR_CURVES: dict[str, Callable[[float, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "one_minus_sqrt": one_minus_sqrt,
}
"""Factor on the phase's peak learning rate, by progress in [0, 1] from the end of its warmup to its own end, and by its final
factor."""
