"""StableAdamW makes the bits of torch-optimi's."""

from contextlib import nullcontext

import optimi
import pytest
import torch

from modernenc.kernels.device import assume_gpu
from modernenc.model.stable_adamw import StableAdamW

SHAPES = [(64, 192), (192, 64), (96,), (7, 33), (1,), (3, 5, 2)]


@pytest.mark.filterwarnings("ignore:You are using weight_decay")
@pytest.mark.parametrize("weight_decay", [0.0, 1e-5, 0.1])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_steps_are_those_of_optimi_to_the_bit(weight_decay, on_gpu):
    """At the first steps, with gradients that grow a hundredfold, and where some parameters have none."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"decouple_lr": True, "max_lr": 2e-2, "triton": False}
    optimizers = (
        StableAdamW(ours, 1e-2, (0.9, 0.98), weight_decay, 1e-6, max_lr=2e-2),
        optimi.StableAdamW(theirs, 1e-2, (0.9, 0.98), weight_decay, 1e-6, **settings),
    )
    for step in range(12):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = (100 if step == 8 else 1) * torch.randn_like(one) if step else torch.zeros_like(one)
            other.grad = one.grad.clone()
        ours[step % 5].grad = theirs[step % 5].grad = None
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 * (step + 1) / 12
            with assume_gpu() if on_gpu else nullcontext():  # parameter by parameter, or all together
                optimizer.step()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other), (step, one.shape, (one - other).abs().max())
