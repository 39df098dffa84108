"""Multiple choice: each ending, read after its context, has a score from its first token; the right one should win."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from modernenc.backbones import Backbone
from modernenc.curriculum import CHOICES
from modernenc.data.masking import MicroBatch
from modernenc.objectives.rounding import rounded


class MultipleChoice(nn.Module):
    """A prediction head of its own and a score, on a backbone that it is given."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.head = backbone.prediction_head()
        self.score = nn.Linear(backbone.hidden_size, 1)

    def forward(self, backbone: Backbone, batch: MicroBatch) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Cross-entropy of the right endings, summed, in nats; and how many of them have the highest score."""
        asked = rounded(batch)
        hidden = backbone(asked.input_ids, asked.cu_seqlens, asked.max_seqlen, asked.target_positions)
        scores = self.score(self.head(hidden))[: CHOICES * len(batch.targets)].view(-1, CHOICES)
        return F.cross_entropy(scores.float(), batch.targets, reduction="sum"), (scores.argmax(1) == batch.targets).sum()
