"""The blocked scan of the moving average computes its definition."""

from collections.abc import Callable

import pytest
import torch

from modernenc.backbones.ema import MultiDimensionDampedEMA, scan
from modernenc.kernels.documents import SEGMENT, Documents
from support.ema import recurrence
from support.tensors import relative

CHANNELS, STATES = 8, 32


def module(memory: str) -> MultiDimensionDampedEMA:
    torch.manual_seed(0)
    ema = MultiDimensionDampedEMA(CHANNELS, STATES)
    if memory == "long":  # decays up to 1 - 1e-6
        torch.nn.init.normal_(ema.damping_factor, -2, 2)
        torch.nn.init.normal_(ema.decay_factor, -2, 2)
    return ema


def documents(*lengths: int) -> Documents:
    return Documents(list(lengths), torch.device("cpu"))


def outcome(
    ema: MultiDimensionDampedEMA, x: torch.Tensor, layout: Documents, average: Callable[..., torch.Tensor] = scan
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the average, and the gradients of a random weighting of it."""
    x = x.clone().requires_grad_()
    out = average(x, ema.coefficients(x.dtype), layout)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    weights = [weight for name, weight in ema.named_parameters() if name != "residual_weight"]
    return out.detach(), list(torch.autograd.grad(out.mul(weight).sum(), [x, *weights]))


def inputs(length: int) -> torch.Tensor:
    return torch.randn(length, CHANNELS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("memory", ["short", "long"])
@pytest.mark.parametrize("length", [1024, 4096, pytest.param(16384, marks=pytest.mark.slow)])
def test_the_scan_equals_the_recurrence_in_double_precision(length, memory):
    x = inputs(length)
    exact, gradients = outcome(module(memory).double(), x.double(), documents(length), recurrence)
    got, got_gradients = outcome(module(memory), x, documents(length))
    error = float((got - exact).abs().max())
    worst = max(relative(one, other) for one, other in zip(got_gradients, gradients, strict=True))
    print(f"{memory} {length}: {error:.1e} of {float(exact.abs().max()):.1f}, gradients {worst:.1e}")
    assert error <= 2e-5
    assert worst <= 1e-5


def test_it_starts_anew_at_each_document():
    lengths = [1, SEGMENT, 3, 2 * SEGMENT, 5 * SEGMENT + 1, SEGMENT - 1, 1]
    ema = module("long").double()
    x = inputs(sum(lengths)).double()
    together, gradients = outcome(ema, x, documents(*lengths))
    for part, gradient, own in zip(x.split(lengths), gradients[0].split(lengths), together.split(lengths), strict=True):
        assert torch.allclose(outcome(ema, part, documents(len(part)))[0], own, rtol=0, atol=1e-12)
        assert gradient.abs().sum() > 0
    change = x.clone()
    change[sum(lengths[:3]) :] += 1
    assert torch.equal(outcome(ema, change, documents(*lengths))[0][: sum(lengths[:3])], together[: sum(lengths[:3])])


def test_memories_of_any_length_stay_finite():
    ema = module("short")
    for logit in (-40.0, 40.0):
        torch.nn.init.constant_(ema.damping_factor, logit)
        torch.nn.init.constant_(ema.decay_factor, logit)
        out, gradients = outcome(ema, inputs(300), documents(300))
        assert out.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_inputs_in_half_precision_are_averaged_in_fp32():
    ema, x = module("long"), inputs(500).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = ema(x, documents(500))
    assert out.dtype == torch.float32
    assert torch.equal(out, ema(x.float(), documents(500)))
