"""Multiple choice: each ending is read after the context and scored at its first token; softmax over the scores picks one."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from modernenc.backbones import Backbone
from modernenc.curriculum import CHOICES
from modernenc.data.batch import MicroBatch


class MultipleChoice(nn.Module):
    """A prediction head and a score, on a backbone that belongs to another module."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.head = backbone.prediction_head()
        self.score = nn.Linear(backbone.hidden_size, 1)

    def forward(self, backbone: Backbone, batch: MicroBatch) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Return the cross-entropy summed over the items, in nats, and the number of items answered correctly."""
        hidden = backbone(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions)
        scores = self.score(self.head(hidden))[: CHOICES * len(batch.targets)].view(-1, CHOICES)
        return F.cross_entropy(scores.float(), batch.targets, reduction="sum"), (scores.argmax(1) == batch.targets).sum()
