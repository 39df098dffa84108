"""The facts about a backbone that other parts of the package need besides its forward pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn


@dataclass(frozen=True)
class Description:
    """Facts about a backbone that its forward pass does not show. Only the first three have no default."""

    layers: Sequence[nn.Module]
    """The layers, from the first: each may be sharded over ranks, or its activations checkpointed, by itself."""
    layer_types: Sequence[str]
    """What each layer attends to, in words that are equal for layers that could take each other's weights."""
    mixing_flops: Callable[[int], float]
    """Forward FLOPs per token of all that mixes tokens, in documents of a given length; linear maps are counted apart."""
    fused_rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Rows of each of the matrices that are stacked in one weight, by how the weight's name ends."""
    compilable: Sequence[nn.Module] = ()
    """The largest modules that are one graph for torch.compile on a GPU, whatever the documents."""
    resizable: frozenset[str] = frozenset()
    """Arguments that may differ from those of a model whose weights it starts from: sizes, and what no logit depends on."""
    backend: Callable[[torch.device, torch.dtype], str] = lambda device, dtype: "attention backend of its own"
    """The name of the implementation, among several equal ones, for a device and a precision; it is logged."""

    def split_sizes(self, name: str) -> Sequence[int]:
        """Return the rows of each matrix stacked in the named weight; empty if it is a single one."""
        return next((rows for ending, rows in self.fused_rows.items() if name.endswith(ending)), ())

    def linear_weights(self) -> list[nn.Parameter]:
        """Return the weights of the linear maps in the layers, each as it is stored, fused or not.

        They are what an optimizer like Muon may orthogonalise: no embedding, no decoder, no norm, no EMA.
        """
        modules = (module for layer in self.layers for module in layer.modules())
        return [cast(nn.Parameter, module.weight) for module in modules if isinstance(module, nn.Linear)]

    def forward_flops(self, length: int) -> float:
        """Return the FLOPs of a forward pass's matrix products, per token in documents of `length` tokens."""
        return 2 * sum(weight.numel() for weight in self.linear_weights()) + self.mixing_flops(length)
