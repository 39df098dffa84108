"""EuroBERT: Boizard et al. 2025, arXiv:2503.05500.

What makes it differ from ModernBERT: it is a Llama that sees both sides.
- RMSNorm in place of LayerNorm, also before the first attention, and none after the embedding
- every layer attends to the whole document
- several heads of queries share one of keys and values (Ainslie et al. 2023, arXiv:2305.13245)
- SwiGLU, with matrices of their own for gate and value
- the decoder reads the last hidden states: there is no prediction head, no bias, and weights of its own unless they are tied

Names of parameters are those of transformers' `EuroBertModel`; `modernenc.hugging_face.eurobert` converts to it.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernenc.backbones.attention import VarlenInfo, attention, describe_backends
from modernenc.backbones.description import Description
from modernenc.backbones.initial import INIT_STD, normal_
from modernenc.backbones.rotary import Rotation, positions_of, rotation
from modernenc.shapes import Count, Depth, Float, Int, Positive


class EuroBERT(nn.Module):
    """Encoder of packed documents. Raises ValueError for sizes that do not fit each other."""

    PHASE_ATTRIBUTES: ClassVar[tuple[str, ...]] = ("rope_theta",)
    HUGGING_FACE: ClassVar[str] = "modernenc.hugging_face.eurobert.EuroBERTConverter"
    decoder_bias: ClassVar[bool] = False

    def __init__(
        self,
        vocab_size: Count,
        hidden_size: Count,
        intermediate_size: Count,
        num_hidden_layers: Depth,
        num_attention_heads: Count,
        num_key_value_heads: Count,
        max_position: Count,
        rope_theta: Positive,
        tie_word_embeddings: bool = True,
        norm_eps: Positive = 1e-5,
        init_std: Positive = INIT_STD,
    ) -> None:
        super().__init__()
        if hidden_size % (2 * num_attention_heads):  # a head's dimensions are rotated in pairs
            raise ValueError(
                f"backbone.hidden_size={hidden_size} must be a multiple of 2 x num_attention_heads={num_attention_heads}"
            )
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"backbone.num_attention_heads={num_attention_heads} must be a multiple of "
                f"num_key_value_heads={num_key_value_heads}"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position = max_position
        self.rope_theta = rope_theta
        self.tie_word_embeddings = tie_word_embeddings
        self.norm_eps = norm_eps
        self.init_std = init_std
        # From an unfilled tensor: the normal_ of nn.Embedding would import torch's compiler on the meta device.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(vocab_size, hidden_size), freeze=False)
        self.layers = nn.ModuleList(
            Layer(hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, norm_eps)
            for _ in range(num_hidden_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                normal_(module.weight, init_std)

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
        places = positions_of(varlen_info.cu_seqlens, len(input_ids))
        turn = rotation(self.rope_theta, self.hidden_size // self.num_attention_heads, places, max_seqlen)
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers[:-1]:
            hidden = layer(hidden, varlen_info, turn)
        # Only the last layer can leave tokens out: those before it feed the keys and values of all.
        return self.norm(self.layers[-1](hidden, varlen_info, turn, positions))

    def token_embeddings(self) -> nn.Embedding:
        """Return the embedding, which the masked-LM decoder may share."""
        return self.embed_tokens

    def prediction_head(self) -> nn.Module:
        """Build no head: the decoder reads the hidden states."""
        return nn.Identity()

    def describe(self) -> Description:
        """Describe the layers, which are all alike, and their FLOPs."""

        def mixing_flops(length: int) -> float:
            # Two products, of queries with keys and of probabilities with values, over all tokens of the document.
            return 4 * self.hidden_size * length * len(self.layers)

        return Description(
            list(self.layers),
            ["global"] * len(self.layers),
            mixing_flops,
            compilable=list(self.layers),  # the attention kernels take documents of any lengths in one call
            resizable=frozenset({
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "max_position", "init_std", "tie_word_embeddings",
            }),
            backend=describe_backends,
        )  # fmt: skip


class Layer(nn.Module):
    """Attention, then SwiGLU, each on a normalised input and added to the residual stream."""

    def __init__(self, hidden_size: int, intermediate_size: int, heads: int, key_value_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden_size, norm_eps)
        self.self_attn = Attention(hidden_size, heads, key_value_heads)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, norm_eps)
        self.mlp = SwiGLU(hidden_size, intermediate_size)

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        varlen_info: VarlenInfo,
        rotation: Rotation,
        positions: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "_ hidden"]:
        attended = self.self_attn(self.input_layernorm(hidden), varlen_info, rotation, positions)
        hidden = attended + (hidden if positions is None else hidden.index_select(0, positions))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    """Multi-head attention to the whole document with rotary positions; groups of heads share keys and values."""

    def __init__(self, hidden_size: int, heads: int, key_value_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden_size // heads
        self.group = heads // key_value_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        varlen_info: VarlenInfo,
        rotation: Rotation,
        positions: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "_ hidden"]:
        q, k, v = (project(hidden).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        shared = (x if self.group == 1 else x.repeat_interleave(self.group, dim=1) for x in (k, v))
        out = attention(torch.stack((q, *shared), dim=1), rotation, varlen_info, None).flatten(1)
        return self.o_proj(out if positions is None else out.index_select(0, positions))


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`: Shazeer 2020, arXiv:2002.05202, equation 6."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
