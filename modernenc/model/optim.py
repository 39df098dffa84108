"""Optimizers: functions `(parameters, matrices, ...) -> optimizers`, chosen by `_target_` in `conf/optim/*.yaml`.

Each parameter group carries `base_lr` and `weight_decays`, and `apply` scales them by the curriculum before each step. So the
constructor's `lr` is the scale on which phases state their learning rates, and its `weight_decay` the phases' default, no more.
Weight decay applies to embeddings and matrices, not to biases and norms. `matrices` are the parameters that may be
orthogonalised. The head of a task has its own optimizers, which pause while other objectives are trained.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge, Interval, Len
from hydra.utils import get_method
from torch import nn
from torch.optim import Optimizer

from modernenc.curriculum import StepSpec
from modernenc.objectives import Objectives

Parameters = Sequence[nn.Parameter]
Rate = Annotated[float, Interval(gt=0, le=100)]
NotNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]
Betas = Annotated[list[Fraction], Len(2, 2)]
_COUNTER = "step"
"""Entry of StableAdamW's parameter groups that is state and not a setting."""


def build(objectives: Objectives, settings: dict[str, Any]) -> list[Optimizer]:
    """Return the optimizers that a recipe's `optim` specifies."""
    make = partial(get_method(settings["_target_"]), **{key: value for key, value in settings.items() if key != "_target_"})
    optimizers = make(list(objectives.masked_lm.parameters()), objectives.backbone.describe().linear_weights())
    return [*optimizers, *(optimizer for task in objectives.tasks.values() for optimizer in make(list(task.parameters()), []))]


def stable_adamw(
    parameters: Parameters, matrices: Parameters, lr: Rate, weight_decay: NotNegative, betas: Betas, eps: NotNegative
) -> list[Optimizer]:
    """Return AdamW with clipped updates and fully decoupled decay, ModernBERT's: Wortsman et al. 2023, arXiv:2304.13013.

    The decay of a step is `weight_decay` x lr / peak lr of the phase.
    """
    from modernenc.model.stable_adamw import StableAdamW  # imports torch.distributed.tensor, which `plan` can do without

    return [StableAdamW(_make_groups(parameters, lr), lr, (betas[0], betas[1]), weight_decay, eps, max_lr=lr)]


def adamw(
    parameters: Parameters, matrices: Parameters, lr: Rate, weight_decay: NotNegative, betas: Betas, eps: NotNegative
) -> list[Optimizer]:
    """Return torch's AdamW, whose decay of a step is `weight_decay` x lr: Loshchilov and Hutter 2017, arXiv:1711.05101."""
    return [torch.optim.AdamW(_make_groups(parameters, lr), lr, (betas[0], betas[1]), eps, weight_decay, fused=True)]


def muon(
    parameters: Parameters,
    matrices: Parameters,
    lr: Rate,
    adamw_lr_ratio: Rate,
    weight_decay: NotNegative,
    momentum: Fraction,
    betas: Betas,
    eps: NotNegative,
    ns_steps: Annotated[int, Interval(ge=1, le=99)] = 5,
) -> list[Optimizer]:
    """Return Muon for the backbone's matrices and AdamW for the rest: Liu et al. 2025, arXiv:2502.16982.

    `adamw_lr_ratio` is the learning rate of AdamW relative to `lr`, so that one number scales both. Updates of matrices are
    scaled to the size of AdamW's, so that AdamW's learning rates carry over. `ns_steps` is the number of Newton-Schulz
    iterations; fewer are faster and orthogonalise less well.
    """
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in parameters if id(parameter) not in chosen]
    others = adamw(rest, [], adamw_lr_ratio * lr, weight_decay, betas, eps)
    if not matrices:
        return others
    from modernenc.model.muon import Muon  # imports torch.distributed.tensor, which `plan` can do without

    return [Muon(_make_groups(matrices, lr), lr, weight_decay, momentum, ns_steps), *others]


def step(optimizers: Iterable[Optimizer]) -> None:
    """Step the optimizers whose weights have gradients, and clear the gradients."""
    for optimizer in optimizers:
        if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
            optimizer.step()
            optimizer.zero_grad()


def apply(optimizers: Iterable[Optimizer], spec: StepSpec, lr_scale: float) -> None:
    """Set the learning rate and weight decay of every group as the curriculum prescribes; `lr_scale` is `optim.lr`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * spec.lr / lr_scale
            group["weight_decay"] = spec.weight_decay if group["weight_decays"] else 0.0
            if "max_lr" in group:  # decoupled decay is relative to this peak
                group["max_lr"] = group["base_lr"] * spec.peak_lr / lr_scale


def state_numbers(target: str, objectives: Objectives) -> int:
    """Return how many numbers the optimizers keep besides the weights: two moments each, and one for a matrix under Muon."""
    numbers = 2 * sum(parameter.numel() for parameter in objectives.parameters())
    if target == f"{muon.__module__}.{muon.__name__}":
        numbers -= sum(parameter.numel() for parameter in objectives.backbone.describe().linear_weights())
    return numbers


def names_of(module: nn.Module) -> dict[int, str]:
    """Return the name of each parameter by its identity: checkpoints use names, optimizers use positions."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


def snapshot(optimizers: Iterable[Optimizer], names: dict[int, str]) -> list[dict[str, Any]]:
    """Return the state of each optimizer by parameter name, without hyperparameters, which the recipe holds."""
    return [
        {
            "state": {names[id(parameter)]: dict(state) for parameter, state in optimizer.state.items()},
            "groups": [{_COUNTER: group[_COUNTER]} if _COUNTER in group else {} for group in optimizer.param_groups],
        }
        for optimizer in optimizers
    ]


def restore(optimizers: Iterable[Optimizer], names: dict[int, str], saved: list[dict[str, Any]]) -> None:
    """Give new optimizers the states that `snapshot` returned, split over ranks as their parameters are.

    An optimizer without a saved state stays new: the head of a task that was not trained yet has none.
    """
    for optimizer in optimizers:
        content = optimizer.state_dict()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        mine = {names[id(parameter)] for parameter in parameters}
        snapshot = next((snapshot for snapshot in saved if mine & snapshot["state"].keys()), None)
        if snapshot is None:
            continue
        content["state"] = {
            position: {key: _split_like(parameter, value) for key, value in snapshot["state"][names[id(parameter)]].items()}
            for position, parameter in enumerate(parameters)
            if names[id(parameter)] in snapshot["state"]
        }
        for group, counters in zip(content["param_groups"], snapshot["groups"], strict=True):
            group.update({name: int(number) for name, number in counters.items() if name in group})
        optimizer.load_state_dict(content)


def _split_like(parameter: nn.Parameter, value: Any) -> Any:
    from torch.distributed.tensor import DTensor, distribute_tensor  # most of a second to import, which `plan` can do without

    if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def _make_groups(parameters: Parameters, lr: float) -> list[dict[str, Any]]:
    """Return the parameters in two groups, those of more than one dimension first, without a group that would be empty."""
    kinds = [(True, [one for one in parameters if one.ndim > 1]), (False, [one for one in parameters if one.ndim <= 1])]
    return [{"params": params, "base_lr": lr, "weight_decays": decays} for decays, params in kinds if params]
