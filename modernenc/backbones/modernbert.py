"""ModernBERT: Warner et al. 2024, arXiv:2412.13663. Parameter names are those of transformers' `ModernBertModel`.

Pre-norm blocks `x += attention(norm(x)); x += mlp(norm(x))`, no biases, rotary positions, GeGLU; every third layer, from the
first, attends globally, the others to a window.
"""

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from modernenc.backbones.attention import Layout, attention, path_for
from modernenc.backbones.dropout import Dropout
from modernenc.backbones.initial import INIT_STD, truncated_normal_
from modernenc.backbones.rotary import Rotation, positions_of, rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModernBERT(nn.Module):
    """Encoder of documents laid end to end.

    `local_attention` is the width of the window, half to each side; `attention_out_dropout` acts after each attention's
    output projection. `init_std` is the standard deviation of new matrices but the output projections, before the cut at two
    of them. Raises ValueError for sizes that do not fit each other.
    """

    PHASE_ATTRIBUTES: ClassVar[tuple[str, ...]] = ("global_rope_theta", "local_rope_theta")
    HUGGING_FACE_NAMES: ClassVar[dict[str, str]] = {"backbone.": "model."}
    HUGGING_FACE_TYPES: ClassVar[tuple[str, ...]] = ("modernbert",)
    HUGGING_FACE_FIXED: ClassVar[dict[str, Any]] = {
        "attention_bias": False, "causal_mask": False, "decoder_bias": True, "hidden_activation": "gelu", "mlp_bias": False,
        "norm_bias": False, "classifier_activation": "gelu", "classifier_bias": False,  # of the masked-LM head too
    }  # fmt: skip
    HUGGING_FACE_IRRELEVANT: ClassVar[tuple[str, ...]] = (
        "attention_dropout", "deterministic_flash_attn", "embedding_dropout", "initializer_cutoff_factor", "mlp_dropout",
        "reference_compile", "repad_logits_with_grad", "sparse_pred_ignore_index", "sparse_prediction",
        "layer_norm_eps", "position_embedding_type",  # stand in the published config.json, and transformers reads neither
    )  # fmt: skip
    MAY_DIFFER: ClassVar[tuple[str, ...]] = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position",
        "attention_out_dropout", "init_std",
    )  # fmt: skip

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        max_position: int,
        global_rope_theta: float,
        local_rope_theta: float,
        global_attn_every_n_layers: int = 3,
        local_attention: int = 128,
        attention_out_dropout: float = 0.0,
        norm_eps: float = 1e-5,
        init_std: float = INIT_STD,
    ) -> None:
        super().__init__()
        if hidden_size % (2 * num_attention_heads):
            raise ValueError(
                f"backbone.hidden_size={hidden_size} must be a multiple of 2 x num_attention_heads={num_attention_heads}"
            )
        if local_attention <= 0 or local_attention % 2:
            raise ValueError(f"backbone.local_attention={local_attention} must be even and above 0: half to each side")
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
        self.embeddings = Embeddings(vocab_size, hidden_size, norm_eps)
        self.layers = nn.ModuleList(
            Layer(
                hidden_size,
                intermediate_size,
                num_attention_heads,
                window=None if index % global_attn_every_n_layers == 0 else local_attention // 2,
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
    ) -> Float[Tensor, "_ hidden"]:
        """Hidden states of documents laid end to end, at all tokens or at `positions`.

        ValueError when a document is longer than `max_position`.
        """
        if max_seqlen > self.max_position:
            raise ValueError(f"a document of {max_seqlen} tokens exceeds backbone.max_position={self.max_position}")
        layout = Layout(cu_seqlens, max_seqlen, len(input_ids), input_ids.device)
        places = positions_of(layout.cu_seqlens, len(input_ids))
        head_dim = self.hidden_size // self.num_attention_heads
        rotations = [rotation(theta, head_dim, places, max_seqlen) for theta in (self.global_rope_theta, self.local_rope_theta)]
        hidden = self.embeddings(input_ids)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            wanted = positions if layer is self.layers[-1] else None
            hidden = layer(hidden, layout, rotations[0 if layer.attn.window is None else 1], wanted)
        return self.final_norm(hidden)

    def token_embeddings(self) -> nn.Embedding:
        """The embedding that the masked-LM decoder shares."""
        return self.embeddings.tok_embeddings

    def prediction_head(self) -> nn.Module:
        """The published head: dense, GELU, norm."""
        return PredictionHead(self.hidden_size, self.norm_eps, self.init_std)

    def blocks(self) -> list[nn.Module]:
        """The layers, each of which may be split over ranks by itself."""
        return list(self.layers)

    def compilable(self) -> list[nn.Module]:
        """The layers: kernels of attention take documents of all lengths at once."""
        return self.blocks()

    def matrices(self) -> list[nn.Parameter]:
        """All matrices of the layers; Wqkv and the GLU's Wi count as one each, unsplit."""
        return [parameter for parameter in self.layers.parameters() if parameter.ndim == 2]

    def flops(self, length: int) -> float:
        """Two per weight; and two products, of queries with keys and of scores with values, over what a token attends to."""
        weights = sum(parameter.numel() for parameter in self.matrices())
        reach = {"global": length, "local": min(length, self.local_attention + 1)}
        return 2 * weights + sum(4 * self.hidden_size * reach[kind] for kind in self.layer_kinds())

    def layer_kinds(self) -> list[str]:
        """Global or local."""
        return ["global" if index % self.global_attn_every_n_layers == 0 else "local" for index in range(len(self.layers))]

    def parts(self, name: str) -> tuple[int, ...]:
        """Wqkv is three matrices, the GLU's Wi two."""
        if name.endswith("Wqkv.weight"):
            return (self.hidden_size,) * 3
        return (self.intermediate_size,) * 2 if name.endswith("Wi.weight") else ()

    @classmethod
    def settings_from_hugging_face(cls, config: dict[str, Any]) -> dict[str, Any]:
        """transformers 4 has one theta per kind of layer and `global_attn_every_n_layers`; 5 has them per kind and layer.

        Where a config.json has both, they must agree.
        """
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        thetas = _thetas(config)
        return {
            **{name: config[name] for name in names},
            "max_position": config["max_position_embeddings"],
            "global_rope_theta": thetas["full_attention"],
            "local_rope_theta": thetas["sliding_attention"],
            "global_attn_every_n_layers": _period(config),
            "local_attention": config.get("local_attention", 128),
            "norm_eps": config.get("norm_eps", 1e-5),
            "init_std": config.get("initializer_range", INIT_STD),
        }

    def path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The attention's."""
        return f"attention by {path_for(device, dtype)}"

    def hugging_face_model(self, **special_ids: Any) -> "PreTrainedModel":
        """The same model for transformers, of the shape only, as it stands now: with the thetas of the phase reached."""
        from transformers import ModernBertConfig, ModernBertForMaskedLM  # 3 s to import

        thetas = {"full_attention": float(self.global_rope_theta), "sliding_attention": float(self.local_rope_theta)}
        both = {  # transformers 4 reads the first three, 5 the others; either writes, as they are set, what it does not read
            "global_attn_every_n_layers": self.global_attn_every_n_layers,
            "global_rope_theta": thetas["full_attention"],
            "local_rope_theta": thetas["sliding_attention"],
            "layer_types": ["full_attention" if kind == "global" else "sliding_attention" for kind in self.layer_kinds()],
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
        }
        config = ModernBertConfig(
            **{"pad_token_id": 0, **special_ids},
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=len(self.layers),
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=self.max_position,
            norm_eps=self.norm_eps,
            local_attention=self.local_attention,
            initializer_range=self.init_std,
            classifier_pooling="mean",
            **both,
        )
        for name, value in both.items():
            setattr(config, name, value)
        return ModernBertForMaskedLM(config)

    def _init_weights(self) -> None:
        """Megatron's: output projections are smaller by sqrt(2 x layers), so that the residual stream keeps its scale."""
        truncated_normal_(self.embeddings.tok_embeddings.weight, self.init_std)
        out_std = self.init_std / math.sqrt(2 * len(self.layers))
        for layer in self.layers:
            assert isinstance(layer, Layer)
            truncated_normal_(layer.attn.Wqkv.weight, self.init_std)
            truncated_normal_(layer.attn.Wo.weight, out_std)
            truncated_normal_(layer.mlp.Wi.weight, self.init_std)
            truncated_normal_(layer.mlp.Wo.weight, out_std)


class Embeddings(nn.Module):
    """Token embedding, normalised."""

    def __init__(self, vocab_size: int, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        # Unfilled: the model initialises it. nn.Embedding's own normal_, on the meta device, would import torch's compiler.
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(vocab_size, hidden_size), freeze=False)
        self.norm = nn.LayerNorm(hidden_size, norm_eps, bias=False)

    def forward(self, input_ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens hidden"]:
        return self.norm(self.tok_embeddings(input_ids))


class Layer(nn.Module):
    """One block: attention, then GeGLU, each on a normalised input and added to the residual."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_attention_heads: int,
        window: int | None,
        attn_norm: nn.Module,
        out_dropout: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.attn_norm = attn_norm
        self.attn = Attention(hidden_size, num_attention_heads, window, out_dropout)
        self.mlp_norm = nn.LayerNorm(hidden_size, norm_eps, bias=False)
        self.mlp = GeGLU(hidden_size, intermediate_size)

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        layout: Layout,
        rotation: Rotation,
        positions: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "_ hidden"]:
        attended = self.attn(self.attn_norm(hidden), layout, rotation, positions)
        hidden = attended + (hidden if positions is None else hidden.index_select(0, positions))
        return hidden + self.mlp(self.mlp_norm(hidden))


class Attention(nn.Module):
    """Multi-head attention with rotary positions; `window` tokens to each side, or the whole document."""

    def __init__(self, hidden_size: int, num_attention_heads: int, window: int | None, out_dropout: float) -> None:
        super().__init__()
        self.heads = num_attention_heads
        self.window = window
        self.Wqkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.Wo = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_drop = Dropout(out_dropout)

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        layout: Layout,
        rotation: Rotation,
        positions: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "_ hidden"]:
        qkv = self.Wqkv(hidden).unflatten(-1, (3, self.heads, -1))
        out = attention(qkv, rotation, layout, self.window).flatten(1)
        return self.out_drop(self.Wo(out if positions is None else out.index_select(0, positions)))


class GeGLU(nn.Module):
    """`Wo(gelu(a) * b)` with `a, b = Wi(x)`: Shazeer 2020, arXiv:2002.05202, equation 6."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.Wi = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.Wo = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        value, gate = self.Wi(hidden).chunk(2, dim=-1)
        return self.Wo(F.gelu(value) * gate)


class PredictionHead(nn.Module):
    """From hidden states to what the decoder reads."""

    def __init__(self, hidden_size: int, norm_eps: float, init_std: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = nn.LayerNorm(hidden_size, norm_eps, bias=False)
        truncated_normal_(self.dense.weight, init_std)

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.norm(F.gelu(self.dense(hidden)))


def _thetas(config: dict[str, Any]) -> dict[str, float]:
    """Rotary bases by kind of layer, in transformers 5's words; ValueError for rotations of another form."""
    fives = config.get("rope_parameters") or {}
    for kind, rope in fives.items():
        known = kind in ("full_attention", "sliding_attention") and isinstance(rope, dict)
        if not known or {**rope, "rope_theta": 0} not in ({"rope_theta": 0}, {"rope_type": "default", "rope_theta": 0}):
            raise ValueError(
                f"rope_parameters.{kind}={rope} in config.json: expected rope_type default and a rope_theta, of full_attention "
                "and sliding_attention"
            )
    thetas, defaults = {}, {"global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0}
    for kind, key in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta")):
        said = fives.get(kind, {}).get("rope_theta")
        four = config.get(key, defaults[key])
        four = config.get("global_rope_theta", defaults["global_rope_theta"]) if four is None else four
        if said is not None and key in config and said != four:
            raise ValueError(f"{key}={four} in config.json, but rope_parameters.{kind} has {said}; which is it?")
        thetas[kind] = four if said is None else said
    return thetas


def _period(config: dict[str, Any]) -> int:
    """At every so many-th layer, from the first on, attention is global; ValueError when it is at others."""
    every, kinds = config.get("global_attn_every_n_layers"), config.get("layer_types")
    if kinds is None:
        return 3 if every is None else every
    if every is None:
        every = kinds[1:].index("full_attention") + 1 if "full_attention" in kinds[1:] else len(kinds)
    layers = range(config["num_hidden_layers"])
    if kinds != ["sliding_attention" if index % every else "full_attention" for index in layers]:
        raise ValueError(
            f"layer_types={kinds} in config.json: expected full_attention at every so many-th of {len(layers)} layers, as "
            "global_attn_every_n_layers says where it is there too"
        )
    return every
