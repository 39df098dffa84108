"""ModernBERT: Warner et al. 2024, arXiv:2412.13663.

What makes it differ from BERT:
- pre-norm layers, `x += attention(norm(x)); x += mlp(norm(x))`, so the residual stream is never normalised
- a norm after the embedding, therefore none before the first attention; one more after the last layer
- rotary positions in place of an embedding of positions
- every third layer, from the first, attends to the whole document; the others to a window of 128 tokens
- GeGLU in place of the two-layer MLP
- no biases, but in the decoder
- no padding: documents lie end to end, as (tokens, hidden), and `cu_seqlens` says where each begins

Names of parameters are those of transformers' `ModernBertModel`; `modernenc.hugging_face.modernbert` converts to it.
"""

import math
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernenc.backbones.attention import VarlenInfo, attention, describe_backends
from modernenc.backbones.description import Description
from modernenc.backbones.initial import INIT_STD, truncated_normal_
from modernenc.backbones.rotary import Rotation, positions_of, rotation
from modernenc.kernels.dropout import Dropout
from modernenc.kernels.geglu import geglu
from modernenc.shapes import Count, Depth, DropoutRate, Even, Float, Int, Positive


class ModernBERT(nn.Module):
    """Encoder of packed documents.

    `local_attention` is the width of the window, half to each side. `attention_out_dropout` follows each attention's output
    projection. `init_std` is the standard deviation of new matrices other than output projections, before numbers beyond two
    of them are redrawn. Without `residual_in_fp32` the residual stream has the precision of autocast, which moves fewer bytes.
    Raises ValueError for sizes that do not fit each other.
    """

    PHASE_ATTRIBUTES: ClassVar[tuple[str, ...]] = ("global_rope_theta", "local_rope_theta")
    HUGGING_FACE: ClassVar[str] = "modernenc.hugging_face.modernbert.ModernBERTConverter"

    def __init__(
        self,
        vocab_size: Count,
        hidden_size: Count,
        intermediate_size: Count,
        num_hidden_layers: Depth,
        num_attention_heads: Count,
        max_position: Count,
        global_rope_theta: Positive,
        local_rope_theta: Positive,
        global_attn_every_n_layers: Count = 3,
        local_attention: Even = 128,
        attention_out_dropout: DropoutRate = 0.0,
        norm_eps: Positive = 1e-5,
        init_std: Positive = INIT_STD,
        residual_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        if hidden_size % (2 * num_attention_heads):  # a head's dimensions are rotated in pairs
            raise ValueError(
                f"backbone.hidden_size={hidden_size} must be a multiple of 2 x num_attention_heads={num_attention_heads}"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.max_position = max_position
        self.global_rope_theta = global_rope_theta
        self.local_rope_theta = local_rope_theta
        self.global_attn_every_n_layers = global_attn_every_n_layers
        self.local_attention = local_attention
        self.norm_eps = norm_eps
        self.init_std = init_std
        self.residual_in_fp32 = residual_in_fp32
        self.embeddings = Embeddings(vocab_size, hidden_size, norm_eps)
        self.layers = nn.ModuleList(
            Layer(
                hidden_size,
                intermediate_size,
                num_attention_heads,
                half_window=None if index % global_attn_every_n_layers == 0 else local_attention // 2,
                # The embedding is normalised already.
                attn_norm=nn.Identity() if index == 0 else nn.LayerNorm(hidden_size, norm_eps, bias=False),
                out_dropout=attention_out_dropout,
                norm_eps=norm_eps,
            )
            for index in range(num_hidden_layers)
        )
        self.final_norm = nn.LayerNorm(hidden_size, norm_eps, bias=False)
        self._init_weights()

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
        varlen_info = VarlenInfo(cu_seqlens, max_seqlen, len(input_ids), input_ids.device, causal)
        # Positions start at 0 in every document. A phase may raise theta to extend the context: Xiong et al. 2023,
        # arXiv:2309.16039.
        places = positions_of(varlen_info.cu_seqlens, len(input_ids))
        head_dim = self.hidden_size // self.num_attention_heads
        global_rotation = rotation(self.global_rope_theta, head_dim, places, max_seqlen)
        local_rotation = rotation(self.local_rope_theta, head_dim, places, max_seqlen)
        hidden = self.embeddings(input_ids)
        if not self.residual_in_fp32 and torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        for layer in self._layers():
            turn = global_rotation if layer.attn.half_window is None else local_rotation
            # Only the last layer can leave tokens out: those before it feed the keys and values of all.
            hidden = layer(hidden, varlen_info, turn, positions if layer is self.layers[-1] else None)
        return self.final_norm(hidden)

    def token_embeddings(self) -> nn.Embedding:
        """Return the embedding, which the masked-LM decoder shares."""
        return self.embeddings.tok_embeddings

    def prediction_head(self) -> nn.Module:
        """Build the published head: dense, GELU, norm."""
        return PredictionHead(self.hidden_size, self.norm_eps, self.init_std)

    def describe(self) -> Description:
        """Describe the layers: which are global, what is fused, and their FLOPs."""
        layer_types = ["global" if layer.attn.half_window is None else "local" for layer in self._layers()]

        def mixing_flops(length: int) -> float:
            # Two products, of queries with keys and of probabilities with values, over all tokens that one attends to.
            reach = {"global": length, "local": min(length, self.local_attention + 1)}
            return sum(4 * self.hidden_size * reach[kind] for kind in layer_types)

        return Description(
            list(self.layers),
            layer_types,
            mixing_flops,
            fused_rows={"Wqkv.weight": (self.hidden_size,) * 3, "Wi.weight": (self.intermediate_size,) * 2},
            compilable=list(self.layers),  # the attention kernels take documents of any lengths in one call
            resizable=frozenset({
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position",
                "attention_out_dropout", "init_std", "residual_in_fp32",
            }),
            backend=describe_backends,
        )  # fmt: skip

    def _init_weights(self) -> None:
        """Initialise as Megatron does: output projections are smaller by sqrt(2 x layers).

        Each layer adds two of them to the residual stream, which so keeps its scale whatever the depth.
        """
        truncated_normal_(self.embeddings.tok_embeddings.weight, self.init_std)
        out_std = self.init_std / math.sqrt(2 * len(self.layers))
        for layer in self._layers():
            truncated_normal_(layer.attn.Wqkv.weight, self.init_std)
            truncated_normal_(layer.attn.Wo.weight, out_std)
            truncated_normal_(layer.mlp.Wi.weight, self.init_std)
            truncated_normal_(layer.mlp.Wo.weight, out_std)

    def _layers(self) -> list["Layer"]:
        return [cast(Layer, layer) for layer in self.layers]


class Embeddings(nn.Module):
    """Token embedding and its norm."""

    def __init__(self, vocab_size: int, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        # From an unfilled tensor: the normal_ of nn.Embedding would import torch's compiler on the meta device.
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(vocab_size, hidden_size), freeze=False)
        self.norm = nn.LayerNorm(hidden_size, norm_eps, bias=False)

    def forward(self, input_ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens hidden"]:
        return self.norm(self.tok_embeddings(input_ids))


class Layer(nn.Module):
    """Attention, then GeGLU, each on a normalised input and added to the residual stream."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_attention_heads: int,
        half_window: int | None,
        attn_norm: nn.Module,
        out_dropout: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.attn_norm = attn_norm
        self.attn = Attention(hidden_size, num_attention_heads, half_window, out_dropout)
        self.mlp_norm = nn.LayerNorm(hidden_size, norm_eps, bias=False)
        self.mlp = GeGLU(hidden_size, intermediate_size)

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        varlen_info: VarlenInfo,
        rotation: Rotation,
        positions: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "_ hidden"]:
        attended = self.attn(self.attn_norm(hidden), varlen_info, rotation, positions)
        hidden = attended + (hidden if positions is None else hidden.index_select(0, positions))
        return hidden + self.mlp(self.mlp_norm(hidden))


class Attention(nn.Module):
    """Multi-head attention with rotary positions, to `half_window` tokens on each side or, if None, to the whole document."""

    def __init__(self, hidden_size: int, num_attention_heads: int, half_window: int | None, out_dropout: float) -> None:
        super().__init__()
        self.heads = num_attention_heads
        self.half_window = half_window
        self.Wqkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.Wo = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_drop = Dropout(out_dropout)

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        varlen_info: VarlenInfo,
        rotation: Rotation,
        positions: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "_ hidden"]:
        qkv = self.Wqkv(hidden).unflatten(-1, (3, self.heads, -1))
        out = attention(qkv, rotation, varlen_info, self.half_window).flatten(1)
        return self.out_drop(self.Wo(out if positions is None else out.index_select(0, positions)))


class GeGLU(nn.Module):
    """`Wo(gelu(a) * b)` with `a, b = Wi(x)`: Shazeer 2020, arXiv:2002.05202, equation 6."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.Wi = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.Wo = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.Wo(geglu(self.Wi(hidden)))


class PredictionHead(nn.Module):
    """Dense layer, GELU and norm between hidden states and the masked-LM decoder."""

    def __init__(self, hidden_size: int, norm_eps: float, init_std: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = nn.LayerNorm(hidden_size, norm_eps, bias=False)
        truncated_normal_(self.dense.weight, init_std)

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.norm(F.gelu(self.dense(hidden)))
