"""Objectives: `(batch) -> summed loss, number of correct predictions`. They share one backbone; each has its own head."""

from collections.abc import Iterable

from jaxtyping import Float, Int
from torch import Tensor, nn

from modernenc.curriculum import OF_TEXT
from modernenc.data.batch import MicroBatch
from modernenc.objectives.masked_lm import MaskedLM
from modernenc.objectives.multiple_choice import MultipleChoice


class Objectives(nn.Module):
    """Everything that a run trains: masked LM, whose head causal LM shares, and one head per task."""

    def __init__(self, masked_lm: MaskedLM, tasks: Iterable[str]) -> None:
        super().__init__()
        self.backbone = masked_lm.backbone
        self.masked_lm = masked_lm
        self.tasks = nn.ModuleDict({name: MultipleChoice(self.backbone) for name in tasks})

    def forward(self, batch: MicroBatch) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Return the summed loss of the batch's objective, in nats, and the number of correct predictions."""
        if batch.objective in OF_TEXT:
            return self.masked_lm(batch)
        return self.tasks[batch.objective](self.backbone, batch)
