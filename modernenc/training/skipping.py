"""Decide which optimizer steps are skipped: those whose gradient is not finite or, if the recipe wants it, far too large."""

import math
from statistics import fmean, pstdev

REMEMBERED = 128
"""Steps before, of the same phase and objective, with which a gradient norm is compared."""


def reason_to_skip(norm: float, earlier: list[float], sigmas: float) -> str:
    """Return why a step with this gradient norm is skipped; empty if it is taken.

    A norm more than `sigmas` (0: any) standard deviations above the mean of the earlier ones is too large, once half of
    `REMEMBERED` are known. This is the rule of OLMo-core's `SkipStepOptimizer`, which proposes 6.
    """
    if not math.isfinite(norm):
        return "its gradient is not finite"
    if not sigmas or len(earlier) < REMEMBERED // 2:
        return ""
    mean, deviation = fmean(earlier), pstdev(earlier)
    if norm <= mean + sigmas * deviation:
        return ""
    return f"its gradient norm is {norm:.3g}, and those before were {mean:.3g} with a standard deviation of {deviation:.2g}"


def remember(norm: float, earlier: list[float]) -> list[float]:
    """Return the earlier norms with this one, whether it was taken or not: where norms have grown for good, steps go on."""
    return [*earlier, norm][-REMEMBERED:] if math.isfinite(norm) else earlier
