"""Masked language modelling, with logits at the predicted tokens only."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from modernenc.backbones import Backbone
from modernenc.data.masking import MicroBatch
from modernenc.objectives.linear_cross_entropy import linear_cross_entropy
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

    def forward(self, batch: MicroBatch) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Cross-entropy of the predicted tokens, summed, in nats; and how many of them are predicted right."""
        asked = rounded(batch)
        hidden = self.head(self.backbone(asked.input_ids, asked.cu_seqlens, asked.max_seqlen, asked.target_positions))
        return linear_cross_entropy(hidden, self.decoder.weight, self.decoder.bias, batch.targets)

    def logits(
        self,
        input_ids: Int[Tensor, " tokens"],
        cu_seqlens: Int[Tensor, " docs_plus_1"],
        max_seqlen: int,
        positions: Int[Tensor, " targets"],
    ) -> Float[Tensor, "targets vocab"]:
        """Scores of every id at the given positions."""
        return self.decoder(self.head(self.backbone(input_ids, cu_seqlens, max_seqlen, positions)))
