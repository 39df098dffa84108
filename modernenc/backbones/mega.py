"""MEGA: Ma et al. 2022, arXiv:2209.10655, as an encoder.

What makes it differ from a Transformer:
- a damped exponential moving average (EMA) over the whole document, in both directions, in every layer (`ema.py`)
- one attention head, whose queries and keys come from one small shared representation of the EMA's output
- attention within chunks of 1,024 tokens, so the cost is linear in length; only the EMA crosses chunks
- a reset gate on attention's output, and an update gate that interpolates between the layer's input and its result
  (`gated_attention.py`); the MLP after it has the usual residual
- order comes from the EMA and a learned bias by distance: there is no embedding of positions
- no final norm, and by default a norm with a single parameter (ScaleNorm)
- no padding: documents lie end to end, as (tokens, hidden), and chunks are counted from each document's start

Names of parameters are those of transformers' `MegaModel`; `modernenc.hugging_face.mega` converts to it.
"""

from typing import Annotated, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernenc.backbones.description import Description
from modernenc.backbones.ema import MultiDimensionDampedEMA
from modernenc.backbones.gated_attention import BIASES, GatedAttention, chunks_of, select_positions
from modernenc.backbones.initial import normal_
from modernenc.kernels.buckets import Buckets
from modernenc.kernels.device import lengths_of
from modernenc.kernels.documents import SEGMENT, Documents
from modernenc.kernels.dropout import Dropout
from modernenc.shapes import Count, Depth, DropoutRate, Even, Float, Int

NORM_EPS = 1e-5


class Mega(nn.Module):
    """Encoder of packed documents.

    `intermediate_size` is the width of values, `nffn_hidden_size` that of the MLP, `shared_representation_size` that of
    queries and keys (the paper's v, d_FFN and z), `ema_projection_size` the number of EMA states per channel and direction.
    From Megalodon (arXiv:2404.08801) come `normalize_attention`, equations 6 to 9, and `two_hop_residual`, equation 11. Raises
    ValueError if `chunk_size` exceeds `max_position`.
    """

    PHASE_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()
    HUGGING_FACE: ClassVar[str] = "modernenc.hugging_face.mega.MegaConverter"

    def __init__(
        self,
        vocab_size: Count,
        hidden_size: Count,
        intermediate_size: Count,
        nffn_hidden_size: Count,
        num_hidden_layers: Depth,
        shared_representation_size: Even,  # the rotary bias turns its numbers in pairs
        ema_projection_size: Count,
        chunk_size: Count,
        max_position: Count,
        normalization_type: Annotated[str, Literal["scalenorm", "layernorm", "rmsnorm"]] = "scalenorm",
        attention_activation: Annotated[str, Literal["softmax", "laplace"]] = "softmax",
        relative_positional_bias: Annotated[str, Literal["simple", "rotary"]] = "simple",
        normalize_attention: bool = False,
        two_hop_residual: bool = False,
        dropout_prob: DropoutRate = 0.1,
        hidden_dropout_prob: DropoutRate = 0.1,
        attention_probs_dropout_prob: DropoutRate = 0.1,
        nffn_activation_dropout_prob: DropoutRate = 0.1,
    ) -> None:
        settings = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        if chunk_size > max_position:
            raise ValueError(f"backbone.chunk_size={chunk_size}: expected at most backbone.max_position={max_position}")
        self.settings = settings
        """All arguments as given, which is what converters write."""
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.chunk_size = chunk_size
        self.max_position = max_position
        self.is_compiled = False
        """Whether batches must be laid out so that one graph of a layer serves all."""
        self.embedding_layer = Embeddings(vocab_size, hidden_size)
        self.layers = nn.ModuleList(
            Layer(
                GatedAttention(
                    hidden_size,
                    intermediate_size,
                    shared_representation_size,
                    Norm(normalization_type, hidden_size),
                    MultiDimensionDampedEMA(hidden_size, ema_projection_size),
                    BIASES[relative_positional_bias](chunk_size, max_position, shared_representation_size),
                    attention_activation,
                    normalize_attention,
                    dropout_prob,
                    hidden_dropout_prob,
                    attention_probs_dropout_prob,
                ),
                NormalizedFFN(hidden_size, nffn_hidden_size, normalization_type, dropout_prob, nffn_activation_dropout_prob),
                two_hop_residual,
            )
            for _ in range(num_hidden_layers)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)

    def forward(
        self,
        input_ids: Int[Tensor, " tokens"],
        cu_seqlens: Int[Tensor, " docs_plus_1"],
        max_seqlen: int,
        positions: Int[Tensor, " some"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "_ hidden"]:
        """Return hidden states at all tokens or at `positions`, each computed from the tokens up to it if `causal`.

        Raises ValueError when a document exceeds `max_position`.
        """
        if max_seqlen > self.max_position:
            raise ValueError(f"a document of {max_seqlen} tokens exceeds backbone.max_position={self.max_position}")
        stream = self.embedding_layer.word_embeddings(input_ids)
        documents = Documents(lengths_of(cu_seqlens), input_ids.device, causal)
        chunks = chunks_of(documents, self.chunk_size, self.is_compiled)
        for layer in self.layers[:-1]:
            stream = layer(stream, documents, chunks)
        # Only the last layer can leave tokens out: those before it feed the keys, values and EMA of all.
        return self.layers[-1](stream, documents, chunks, positions)

    def token_embeddings(self) -> nn.Embedding:
        """Return the embedding, which the masked-LM decoder shares."""
        return self.embedding_layer.word_embeddings

    def prediction_head(self) -> nn.Module:
        """Build the published head: dense, tanh."""
        return PredictionHead(self.hidden_size)

    def describe(self) -> Description:
        """Describe the layers, which are all alike: the matrices that are fused, and their FLOPs."""
        sizes, layers = self.settings, [cast(Layer, layer) for layer in self.layers]

        def mixing_flops(length: int) -> float:
            # Attention over a chunk: scores of width z, and values. The EMA: a Toeplitz product inside segments, and products
            # into the states of both directions and out of them.
            attention = 2 * min(length, self.chunk_size) * (sizes["shared_representation_size"] + sizes["intermediate_size"])
            ema = 2 * self.hidden_size * (SEGMENT + 4 * sizes["ema_projection_size"])
            return len(layers) * (attention + ema)

        directions = (self.hidden_size, self.hidden_size)
        projections = layers[0].mega_layer.widths
        return Description(
            layers,
            ["mega"] * len(layers),
            mixing_flops,
            fused_rows={
                "mx_proj.weight": projections, "mx_proj.bias": projections, "damping_factor": directions,
                "decay_factor": directions, "ema_expansion_matrix": directions, "kernel_projection_matrix": directions,
            },
            compilable=layers,  # chunks are then of few lengths, which do not depend on the documents
            resizable=frozenset({
                "vocab_size", "hidden_size", "intermediate_size", "nffn_hidden_size", "num_hidden_layers",
                "shared_representation_size", "ema_projection_size", "max_position", "dropout_prob", "hidden_dropout_prob",
                "attention_probs_dropout_prob", "nffn_activation_dropout_prob",
            }),
        )  # fmt: skip


class Embeddings(nn.Module):
    """Token embedding, without positions and without a norm."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        # From an unfilled tensor: the normal_ of nn.Embedding would import torch's compiler on the meta device.
        self.word_embeddings = nn.Embedding.from_pretrained(torch.empty(vocab_size, hidden_size), freeze=False)
        normal_(self.word_embeddings.weight)


class Layer(nn.Module):
    """Gated attention, then the MLP. With `two_hop`, the MLP is added to the layer's input, not to attention's output."""

    def __init__(self, mega_layer: GatedAttention, nffn: "NormalizedFFN", two_hop: bool) -> None:
        super().__init__()
        self.mega_layer = mega_layer
        self.nffn = nffn
        self.two_hop = two_hop

    def forward(
        self,
        stream: Float[Tensor, "tokens hidden"],
        documents: Documents,
        chunks: Buckets,
        positions: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "_ hidden"]:
        attended = self.mega_layer(stream, documents, chunks, positions)
        return (select_positions(stream, positions) if self.two_hop else attended) + self.nffn(attended)


class NormalizedFFN(nn.Module):
    """The pre-norm MLP, without its residual."""

    def __init__(self, hidden_size: int, width: int, normalization_type: str, dropout: float, inner_dropout: float) -> None:
        super().__init__()
        self.norm = Norm(normalization_type, hidden_size)
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, hidden_size)
        self.inner_dropout = Dropout(inner_dropout)
        self.dropout = Dropout(dropout)

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.dropout(self.fc2(self.inner_dropout(F.silu(self.fc1(self.norm(hidden))))))


class Norm(nn.Module):
    """One of `NORMS`, wrapped because transformers names its parameters `norm.norm`."""

    def __init__(self, kind: str, hidden_size: int) -> None:
        super().__init__()
        self.norm = NORMS[kind](hidden_size, eps=NORM_EPS)

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.norm(hidden)


class ScaleNorm(nn.Module):
    """`scalar x / rms(x)`, with one learned number for all channels: Nguyen and Salazar 2019, arXiv:1910.05895."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scalar = nn.Parameter(torch.ones(1))

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return F.rms_norm(hidden, hidden.shape[-1:], eps=self.eps) * self.scalar


NORMS = {"scalenorm": ScaleNorm, "layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


class PredictionHead(nn.Module):
    """Dense layer and tanh between hidden states and the masked-LM decoder."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        _init_linear(self.dense)

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.dense(hidden).tanh()


def _init_linear(linear: nn.Linear) -> None:
    normal_(linear.weight)
    nn.init.zeros_(linear.bias)
