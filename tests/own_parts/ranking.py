"""An objective of one's own, as docs/extend.md explains it: four endings ranked by a margin in place of a softmax."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from modernenc.backbones import Backbone
from modernenc.curriculum import CHOICES
from modernenc.data.batch import MicroBatch


class Ranking(nn.Module):
    """The right ending should score higher than each other one, by one at least."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.head = backbone.prediction_head()
        self.score = nn.Linear(backbone.hidden_size, 1)

    def forward(self, backbone: Backbone, batch: MicroBatch) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Return the hinge loss summed over the items, and the number of items answered correctly."""
        hidden = backbone(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions)
        scores = self.score(self.head(hidden))[: CHOICES * len(batch.targets)].view(-1, CHOICES).float()
        loss = F.multi_margin_loss(scores, batch.targets, reduction="sum")
        return loss, (scores.argmax(1) == batch.targets).sum()
