"""Masked language modelling, with logits only at the predicted tokens: Devlin et al. 2018, arXiv:1810.04805, section 3.1.

Causal language modelling takes the same weights: it differs in what a token sees, and in which tokens are predicted.
"""

from jaxtyping import Float, Int
from torch import Tensor, nn

from modernenc.backbones import Backbone
from modernenc.backbones.initial import normal_
from modernenc.curriculum import CAUSAL_LM
from modernenc.data.batch import MicroBatch
from modernenc.objectives.linear_cross_entropy import linear_cross_entropy


class MaskedLM(nn.Module):
    """A backbone, a prediction head, and a decoder.

    The decoder has a bias, unless the backbone's `decoder_bias` is false, and the weight of the token embedding, unless its
    `tie_word_embeddings` is.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = backbone.prediction_head()
        embedding = backbone.token_embeddings().weight
        self.decoder = nn.Linear(backbone.hidden_size, backbone.vocab_size, bias=getattr(backbone, "decoder_bias", True))
        if getattr(backbone, "tie_word_embeddings", True):
            self.decoder.weight = embedding
        else:
            normal_(self.decoder.weight)
        if self.decoder.bias is not None:
            nn.init.zeros_(self.decoder.bias)

    def forward(self, batch: MicroBatch) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
        """Return the cross-entropy summed over the predicted tokens, in nats, and the number of correct predictions."""
        documents = batch.input_ids, batch.cu_seqlens, batch.max_seqlen
        causal = {"causal": True} if batch.objective == CAUSAL_LM else {}  # which a backbone of the user's may not know
        hidden = self.backbone(*documents, batch.target_positions, **causal)
        bias = self.decoder.weight.new_zeros(len(self.decoder.weight)) if self.decoder.bias is None else self.decoder.bias
        return linear_cross_entropy(self.head(hidden), self.decoder.weight, bias, batch.targets)

    def logits(
        self,
        input_ids: Int[Tensor, " tokens"],
        cu_seqlens: Int[Tensor, " docs_plus_1"],
        max_seqlen: int,
        positions: Int[Tensor, " targets"],
    ) -> Float[Tensor, "targets vocab"]:
        """Return the logits of all ids at the given positions."""
        return self.decoder(self.head(self.backbone(input_ids, cu_seqlens, max_seqlen, positions)))
