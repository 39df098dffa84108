"""Muon (Jordan 2024; Liu et al. 2025, arXiv:2502.16982) for matrices that are whole, or that FSDP2 has split over ranks.

torch's own needs whole matrices, and the two make the same bits of them. A matrix that is split is orthogonalised by one rank,
its owner; the ranks take turns, so that they work side by side.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

COMPUTE_TYPE = torch.bfloat16
"""Type in which matrices are orthogonalised."""
_QUINTIC = (3.4445, -4.775, 2.0315)
"""Coefficients of the iteration, chosen for a steep slope at 0: Jordan 2024."""


class Muon(Optimizer):
    """Momentum, orthogonalised, with Nesterov's look ahead and decoupled weight decay.

    Updates have the root mean square that is typical of AdamW's (Liu et al. 2025, equation 4), so that its rates carry over.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, weight_decay: float, momentum: float, ns_steps: int = 5, eps: float = 1e-7
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps, "eps": eps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step; a closure is not called."""
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            split = matrices and isinstance(matrices[0], DTensor)
            for some in in_turns(matrices) if split else by_shape(matrices):
                make = orthogonalise_in_turn if split else orthogonalise
                updates = make(self._look_ahead(some, group["momentum"]), group["ns_steps"], group["eps"])
                torch._foreach_mul_(some, 1 - group["lr"] * group["weight_decay"])
                for matrix, update in zip(some, updates, strict=True):
                    matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))

    def _look_ahead(self, matrices: list[Tensor], momentum: float) -> list[Tensor]:
        """Update the momentum of the matrices, and turn their gradients into what it will be after another such gradient."""
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        torch._foreach_lerp_(gradients, buffers, momentum)
        return gradients


def by_shape(matrices: list[Tensor]) -> list[list[Tensor]]:
    """Return the matrices in groups of equal shapes, transposed or not, each of which is one product for a GPU to launch."""
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    for matrix in matrices:
        groups.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
    return list(groups.values())


def in_turns(matrices: list[Any]) -> list[list[Any]]:
    """Return the matrices, which are split, in groups of as many as there are ranks."""
    ranks = matrices[0].device_mesh.size()
    return [matrices[first : first + ranks] for first in range(0, len(matrices), ranks)]


def orthogonalise_in_turn(updates: list[Any], steps: int, eps: float) -> list[Any]:
    """Return the updates, which are split over the ranks, orthogonalised: the n-th by the n-th rank."""
    mesh, placements = updates[0].device_mesh, updates[0].placements
    mine = mesh.get_local_rank()
    whole = [update.full_tensor() for update in updates]
    if mine < len(whole):
        (whole[mine],) = orthogonalise([whole[mine]], steps, eps)
    return [
        distribute_tensor(update.to(COMPUTE_TYPE), mesh, placements, src_data_rank=owner) for owner, update in enumerate(whole)
    ]


def orthogonalise(matrices: list[Tensor], steps: int, eps: float) -> list[Tensor]:
    """Return matrices with the same singular vectors and singular values near 1, by Newton-Schulz iterations.

    The matrices have one shape, transposed or not, and are multiplied together.
    """
    a, b, c = _QUINTIC
    x = torch.stack([(matrix if _is_wide(matrix) else matrix.T).to(COMPUTE_TYPE) for matrix in matrices])
    x.div_(x.norm(dim=(1, 2), keepdim=True).clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return [one if _is_wide(matrix) else one.T for one, matrix in zip(x, matrices, strict=True)]


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]
