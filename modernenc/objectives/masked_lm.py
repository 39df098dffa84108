"""Masked language modelling, with logits at the predicted tokens only."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from modernenc.backbones import Backbone
from modernenc.data.masking import MicroBatch
from modernenc.objectives.rounding import rounded


class MaskedLM(nn.Module):
    """Backbone, prediction head, and a decoder tied to the token embedding."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = backbone.prediction_head()
        self.decoder = nn.Linear(backbone.hidden_size, backbone.vocab_size)
        self.decoder.weight = backbone.token_embeddings().weight
        nn.init.zeros_(self.decoder.bias)

    def forward(self, batch: MicroBatch) -> tuple[Float[Tensor, ""], Float[Tensor, "targets vocab"]]:
        """Cross-entropy of the predicted tokens, summed, in nats; and the logits it came from."""
        asked = rounded(batch)
        logits = self.logits(asked.input_ids, asked.cu_seqlens, asked.max_seqlen, asked.target_positions)
        logits = logits[: len(batch.targets)]
        return F.cross_entropy(logits.float(), batch.targets, reduction="sum"), logits

    def logits(
        self,
        input_ids: Int[Tensor, " tokens"],
        cu_seqlens: Int[Tensor, " docs_plus_1"],
        max_seqlen: int,
        positions: Int[Tensor, " targets"],
    ) -> Float[Tensor, "targets vocab"]:
        """Scores of every id at the given positions."""
        return self.decoder(self.head(self.backbone(input_ids, cu_seqlens, max_seqlen, positions)))
