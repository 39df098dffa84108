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
            ranks = _ranks_of(matrices)
            for first in range(0, len(matrices), ranks):
                turn = matrices[first : first + ranks]
                updates = [self._look_ahead(matrix, group["momentum"]) for matrix in turn]
                for matrix, update in zip(turn, orthogonalise_in_turn(updates, group["ns_steps"], group["eps"]), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))

    def _look_ahead(self, matrix: Tensor, momentum: float) -> Tensor:
        """Update the momentum of a matrix, and return what it will be after another such gradient."""
        gradient, state = matrix.grad, self.state[matrix]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum_buffer"], momentum)


def _ranks_of(matrices: list[Tensor]) -> int:
    """Return over how many ranks the matrices are split."""
    return matrices[0].device_mesh.size() if matrices and isinstance(matrices[0], DTensor) else 1


def orthogonalise_in_turn(updates: list[Tensor], steps: int, eps: float) -> list[Tensor]:
    """Return the updates orthogonalised: each where it is, or the n-th of those that are split by the n-th rank."""
    if not isinstance(updates[0], DTensor):
        return [orthogonalise(update, steps, eps) for update in updates]
    mesh, placements = updates[0].device_mesh, updates[0].placements
    mine = mesh.get_local_rank()
    whole = [update.full_tensor() for update in updates if isinstance(update, DTensor)]
    whole = [orthogonalise(update, steps, eps) if owner == mine else update for owner, update in enumerate(whole)]
    return [
        distribute_tensor(update.to(COMPUTE_TYPE), mesh, placements, src_data_rank=owner) for owner, update in enumerate(whole)
    ]


def orthogonalise(matrix: Tensor, steps: int, eps: float) -> Tensor:
    """Return a matrix with the same singular vectors and singular values near 1, by Newton-Schulz iterations."""
    a, b, c = _QUINTIC
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(COMPUTE_TYPE, copy=True)
    x.div_(x.norm().clamp(min=eps))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
