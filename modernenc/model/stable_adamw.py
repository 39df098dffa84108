"""StableAdamW: Wortsman et al. 2023, arXiv:2304.13013, appendix E, with fully decoupled weight decay.

torch-optimi's, which ModernBERT was trained with, reads a number from the GPU for each parameter, and so lets it run dry more
than a hundred times in a step. The two make the same bits on a CPU.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from modernenc.kernels.device import use_gpu_kernels

_MOMENTS = "exp_avg", "exp_avg_sq"


class StableAdamW(Optimizer):
    """AdamW whose step on a parameter is shortened by how far its gradients exceed their second moments, as Adafactor's is.

    The moments are debiased through their rates. The weight decay of a step is `weight_decay` x lr / `max_lr`, where lr is the
    shortened one.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float, eps: float, max_lr: float
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps, "max_lr": max_lr, "step": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step; a closure is not called."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            group["step"] += bool(parameters)
            # Together they take a GPU fewer launches; one after another, large ones stay in the cache of a CPU.
            large = not use_gpu_kernels(group["params"][0].device) and group["params"][0].ndim > 1
            together = 1 if large else max(1, len(parameters))
            for first in range(0, len(parameters), together):
                self._update(parameters[first : first + together], group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        new_1, new_2 = (1 - _debiased(beta, group["step"]) for beta in group["betas"])
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {name: torch.zeros_like(parameter) for name in _MOMENTS}
        weights, grads = _local(parameters), _local(parameter.grad for parameter in parameters)
        means, squares = (_local(self.state[parameter][name] for parameter in parameters) for name in _MOMENTS)
        torch._foreach_lerp_(means, grads, new_1)
        torch._foreach_mul_(squares, 1 - new_2)
        torch._foreach_addcmul_(squares, grads, grads, new_2)
        excess = torch._foreach_mul(grads, grads)
        torch._foreach_div_(excess, torch._foreach_clamp_min(squares, group["eps"] ** 2))
        mean = [numbers.sum() for numbers in excess]
        del excess
        torch._foreach_div_(mean, [parameter.numel() for parameter in parameters])
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_add_(denominators, group["eps"])
        roots = _sum_over_ranks(torch.stack(mean), parameters[0]).sqrt_()
        lr, decay = group["lr"], group["weight_decay"] / group["max_lr"]
        if use_gpu_kernels(roots.device):
            lrs = lr / roots.double().clamp_(min=1)
            torch._foreach_mul_(weights, list((1 - lrs * decay).float().unbind()))
            torch._foreach_addcdiv_(weights, torch._foreach_mul(means, list((-lrs).float().unbind())), denominators)
        else:  # a CPU reads numbers at once
            shortened = [lr / max(1.0, root) for root in roots.tolist()]
            torch._foreach_mul_(weights, [1 - one * decay for one in shortened])
            torch._foreach_addcdiv_(weights, means, denominators, [-one for one in shortened])


def _local(tensors: Iterable[Any]) -> list[Tensor]:
    """Return what this rank has of each tensor."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _debiased(beta: float, step: int) -> float:
    """Return the rate at which a moving average that starts at 0 is one of what was seen: beta (1-beta^(t-1)) / (1-beta^t)."""
    return (beta**step - beta) / (beta**step - 1)


def _sum_over_ranks(numbers: Tensor, parameter: Tensor) -> Tensor:
    """Return the numbers summed over the ranks among which a parameter is split, if it is."""
    if isinstance(parameter, DTensor):
        torch.distributed.all_reduce(numbers, group=parameter.device_mesh.get_group())
    return numbers
