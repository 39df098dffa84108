"""Metrics of the steps since the last row of `metrics.csv`, kept on the device so that no step waits for them."""

from dataclasses import dataclass, field

import torch

from modernenc.curriculum import StepSpec


@dataclass
class Metrics:
    """Accumulated metrics of one objective's steps."""

    spec: StepSpec
    """The last of these steps."""
    loss: torch.Tensor
    """Sum over what this rank predicted, in nats."""
    targets: int = 0
    """Predicted tokens, or items, of all ranks."""
    tokens: int = 0
    """This rank's tokens without padding, since this process began."""
    grad_norm: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    """Largest norm of a step's gradient, before clipping."""
    skipped: int = 0
    """Steps that were skipped; nothing else counts them."""

    def add(self, spec: StepSpec, loss: torch.Tensor, targets: int, tokens: int, grad_norm: torch.Tensor) -> None:
        """Add one step."""
        self.spec = spec
        self.loss = self.loss.to(loss.device) + loss
        self.targets += targets
        self.tokens += tokens
        self.grad_norm = torch.maximum(self.grad_norm.to(loss.device), grad_norm)

    def skip(self, spec: StepSpec, tokens: int) -> None:
        """Count one step that was skipped."""
        self.spec = spec
        self.tokens += tokens
        self.skipped += 1
