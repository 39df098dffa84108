"""BERT: Devlin et al. 2018, arXiv:1810.04805. A backbone of one's own, as docs/extend.md explains it.

Learned positions, and layers that normalise after each residual addition: `x = norm(x + attention(x)); x = norm(x + mlp(x))`.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from modernenc.backbones import Description
from modernenc.backbones.initial import normal_


class Bert(nn.Module):
    """Encoder of packed documents. Raises ValueError for a width that the heads do not divide."""

    PHASE_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, vocab_size: int, hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int,
        max_position: int, dropout_prob: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(f"backbone.hidden_size={hidden_size}: expected a multiple of {num_attention_heads} heads")
        self.vocab_size, self.hidden_size, self.max_position = vocab_size, hidden_size, max_position
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size)
        self.position_embeddings = nn.Embedding(max_position, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout_prob)
        self.layers = nn.ModuleList(
            Layer(hidden_size, intermediate_size, num_attention_heads, dropout_prob) for _ in range(num_hidden_layers)
        )
        for weight in self.parameters():
            if weight.ndim == 2:
                normal_(weight)

    def forward(
        self, input_ids: Int[Tensor, " tokens"], cu_seqlens: Int[Tensor, " docs_plus_1"], max_seqlen: int,
        positions: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "_ hidden"]:  # fmt: skip
        """Return hidden states at all tokens or at `positions`; ValueError when a document exceeds `max_position`."""
        if max_seqlen > self.max_position:
            raise ValueError(f"a document of {max_seqlen} tokens exceeds backbone.max_position={self.max_position}")
        lengths = cu_seqlens.diff().tolist()
        places = torch.cat([torch.arange(length, device=input_ids.device) for length in lengths])  # from 0 in each document
        hidden = self.dropout(self.norm(self.word_embeddings(input_ids) + self.position_embeddings(places)))
        for layer in self.layers:
            hidden = layer(hidden, lengths)
        return hidden if positions is None else hidden.index_select(0, positions)

    def token_embeddings(self) -> nn.Embedding:
        """Return the embedding, which the masked-LM decoder shares."""
        return self.word_embeddings

    def prediction_head(self) -> nn.Module:
        """Build the head of the paper: dense, GELU, norm."""
        return nn.Sequential(nn.Linear(self.hidden_size, self.hidden_size), nn.GELU(), nn.LayerNorm(self.hidden_size))

    def describe(self) -> Description:
        """Describe the layers: all are global, and each token attends to its document in two matrix products."""
        return Description(
            layers=list(self.layers),
            layer_types=["global"] * len(self.layers),
            mixing_flops=lambda length: 4.0 * self.hidden_size * length * len(self.layers),
        )


class Layer(nn.Module):
    """Attention, then an MLP, each added to the residual stream, which is normalised afterwards."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_attention_heads: int, dropout_prob: float) -> None:
        super().__init__()
        self.heads = num_attention_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, intermediate_size), nn.GELU(), nn.Linear(intermediate_size, hidden_size)
        )
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout_prob)

    def forward(self, hidden: Float[Tensor, "tokens hidden"], lengths: list[int]) -> Float[Tensor, "tokens hidden"]:
        q, k, v = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)  # each (heads, tokens, head_dim)
        documents = zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)
        attended = torch.cat([F.scaled_dot_product_attention(*document) for document in documents], 1)
        hidden = self.attention_norm(hidden + self.dropout(self.out(attended.transpose(0, 1).flatten(1))))
        return self.mlp_norm(hidden + self.dropout(self.mlp(hidden)))
