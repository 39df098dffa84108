"""Masked language modelling, with logits only at the predicted tokens: Devlin et al. 2018, arXiv:1810.04805, section 3.1."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from modernenc.backbones import Backbone
from modernenc.data.batch import MicroBatch
from modernenc.objectives.linear_cross_entropy import linear_cross_entropy


class MaskedLM(nn.Module):
    """A backbone, a prediction head, and a decoder tied to the token embedding."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = backbone.prediction_head()
        self.decoder = nn.Linear(backbone.hidden_size, backbone.vocab_size)
        self.decoder.weight = backbone.token_embeddings().weight
        nn.init.zeros_(self.decoder.bias)

    def forward(self, batch: MicroBatch) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Return the cross-entropy summed over the predicted tokens, in nats, and the number of correct predictions."""
        hidden = self.head(self.backbone(batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions))
        return linear_cross_entropy(hidden, self.decoder.weight, self.decoder.bias, batch.targets)

    def logits(
        self,
        input_ids: Int[Tensor, " tokens"],
        cu_seqlens: Int[Tensor, " docs_plus_1"],
        max_seqlen: int,
        positions: Int[Tensor, " targets"],
    ) -> Float[Tensor, "targets vocab"]:
        """Return the logits of all ids at the given positions."""
        return self.decoder(self.head(self.backbone(input_ids, cu_seqlens, max_seqlen, positions)))
