"""MEGA: Ma et al. 2022, arXiv:2209.10655. Parameter names are those of transformers' `MegaModel`.

Each block smooths the normalised stream by an EMA, attends within chunks by one gated head, and moves the stream towards the
result by a learned share; a plain MLP follows. Only the EMA crosses chunks, which are counted from each document's start.
"""

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .buckets import Buckets
from .dropout import Dropout
from .ema import BLOCK, PATHS, Documents, MultiDimensionDampedEMA
from .gated_attention import BIASES, GatedAttention, at, chunks_of
from .initial import normal_
from .shapes import Float, Int
from .transfer import lengths_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORM_EPS = 1e-5


class Mega(nn.Module):
    """Encoder of documents laid end to end.

    `intermediate_size` is the width of values, `nffn_hidden_size` that of the MLP, `shared_representation_size` that of
    queries and keys, `ema_projection_size` the number of states per channel and direction. `normalization_type` is scalenorm,
    layernorm or rmsnorm, `attention_activation` softmax or laplace, `relative_positional_bias` simple or rotary; `ema` is one
    of `ema.PATHS`. From Megalodon (arXiv:2404.08801) come `normalize_attention`, equation 11, and `two_hop_residual`,
    equation 14. Raises ValueError for anything else.
    """

    PHASE_ATTRIBUTES: ClassVar[tuple[str, ...]] = ()
    HUGGING_FACE_NAMES: ClassVar[dict[str, str]] = {"backbone.": "mega.", "head.dense.": "dense.", "decoder.": "mlm_head."}
    HUGGING_FACE_TYPES: ClassVar[tuple[str, ...]] = ("mega", "modernenc-mega")
    HUGGING_FACE_FIXED: ClassVar[dict[str, Any]] = {
        "activation": "silu", "add_lm_hidden_dense_layer": True, "add_token_type_embeddings": False, "bidirectional": True,
        "norm_affine": True, "normalize_before_ffn": True, "normalize_before_mega": True, "truncation": None,
        "use_normalized_ffn": True,
    }  # fmt: skip
    HUGGING_FACE_IRRELEVANT: ClassVar[tuple[str, ...]] = (
        "auto_map", "ema_beta_range", "ema_delta_alpha_range", "ema_gamma_omega_range", "initializer_range",
        "num_attention_heads", "type_vocab_size", "use_feature_dropout",
    )  # fmt: skip
    MAY_DIFFER: ClassVar[tuple[str, ...]] = (
        "vocab_size", "hidden_size", "intermediate_size", "nffn_hidden_size", "num_hidden_layers",
        "shared_representation_size", "ema_projection_size", "max_position", "dropout_prob", "hidden_dropout_prob",
        "attention_probs_dropout_prob", "nffn_activation_dropout_prob", "ema",
    )  # fmt: skip

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        nffn_hidden_size: int,
        num_hidden_layers: int,
        shared_representation_size: int,
        ema_projection_size: int,
        chunk_size: int,
        max_position: int,
        normalization_type: str = "scalenorm",
        attention_activation: str = "softmax",
        relative_positional_bias: str = "simple",
        normalize_attention: bool = False,
        two_hop_residual: bool = False,
        dropout_prob: float = 0.1,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        nffn_activation_dropout_prob: float = 0.1,
        ema: str = "scan",
    ) -> None:
        settings = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        for key, value, known in (
            ("normalization_type", normalization_type, NORMS),
            ("attention_activation", attention_activation, ("softmax", "laplace")),
            ("relative_positional_bias", relative_positional_bias, BIASES),
            ("ema", ema, PATHS),
        ):
            if value not in known:
                raise ValueError(f"backbone.{key}={value}: expected one of {', '.join(known)}")
        if not 0 < chunk_size <= max_position:
            raise ValueError(f"backbone.chunk_size={chunk_size}: expected 1 to backbone.max_position={max_position}")
        if shared_representation_size % 2:
            raise ValueError(f"backbone.shared_representation_size={shared_representation_size}: expected an even number")
        self.settings = settings
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.chunk_size = chunk_size
        self.max_position = max_position
        self.embedding_layer = Embeddings(vocab_size, hidden_size)
        self.layers = nn.ModuleList(
            Block(
                GatedAttention(
                    hidden_size,
                    intermediate_size,
                    shared_representation_size,
                    Norm(normalization_type, hidden_size),
                    MultiDimensionDampedEMA(hidden_size, ema_projection_size, ema),
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
    ) -> Float[Tensor, "_ hidden"]:
        """Hidden states of documents laid end to end, at all tokens or at `positions`.

        ValueError when a document is longer than `max_position`.
        """
        if max_seqlen > self.max_position:
            raise ValueError(f"a document of {max_seqlen} tokens exceeds backbone.max_position={self.max_position}")
        hidden = self.embedding_layer.word_embeddings(input_ids)
        documents = Documents(lengths_of(cu_seqlens), input_ids.device)
        chunks = chunks_of(documents, self.chunk_size)
        for layer in self.layers[:-1]:
            hidden = layer(hidden, documents, chunks)
        return self.layers[-1](hidden, documents, chunks, positions)

    def token_embeddings(self) -> nn.Embedding:
        """The embedding that the masked-LM decoder shares."""
        return self.embedding_layer.word_embeddings

    def prediction_head(self) -> nn.Module:
        """The published head: dense, tanh."""
        return PredictionHead(self.hidden_size)

    def blocks(self) -> list[nn.Module]:
        """The layers, each of which may be split over ranks by itself."""
        return list(self.layers)

    def compilable(self) -> list[nn.Module]:
        """The MLPs: attention has as many products as chunks have lengths."""
        return [cast(Block, layer).nffn for layer in self.layers]

    def matrices(self) -> list[nn.Parameter]:
        """Weights of the layers' linear maps, each as it is, fused or not; the EMA and the maps to queries and keys are not."""
        return [cast(nn.Parameter, module.weight) for module in self.layers.modules() if isinstance(module, nn.Linear)]

    def flops(self, length: int) -> float:
        """Two per weight; attention over a chunk; and the EMA, by blocks: inside them, into states and out of them."""
        weights = sum(parameter.numel() for parameter in self.matrices())
        sizes = self.settings
        attention = 2 * min(length, self.chunk_size) * (sizes["shared_representation_size"] + sizes["intermediate_size"])
        ema = 2 * self.hidden_size * (BLOCK + 4 * sizes["ema_projection_size"])
        return 2 * weights + len(self.layers) * (attention + ema)

    def layer_kinds(self) -> list[str]:
        """All alike."""
        return ["mega"] * len(self.layers)

    def parts(self, name: str) -> tuple[int, ...]:
        """What the map from the EMA feeds, and the two directions of the EMA."""
        if ".mx_proj." in name:
            layer = cast(Block, self.layers[0])
            return layer.mega_layer.widths
        both = (self.hidden_size, self.hidden_size)
        return both if ".ema_gate." in name and not name.endswith("residual_weight") else ()

    @classmethod
    def settings_from_hugging_face(cls, config: dict[str, Any]) -> dict[str, Any]:
        """transformers' MEGA as it is by default, within chunks or not."""
        own = inspect.signature(cls.__init__).parameters
        names = [name for name in own if name not in ("self", "max_position")]
        for key, value in (("normalization_type", "rmsnorm"), ("normalize_attention", True), ("two_hop_residual", True)):
            if config["model_type"] == "mega" and config.get(key) == value:
                raise ValueError(f"{key}={value} in config.json: in transformers' MEGA it does nothing, here it does")
        ours = ("normalize_attention", "two_hop_residual", "ema")  # which transformers' has not
        settings = {name: config.get(name, own[name].default) if name in ours else config[name] for name in names}
        if not config["use_chunking"]:
            settings["chunk_size"] = config["max_positions"]
        return {**settings, "max_position": config["max_positions"]}

    def path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The EMA's; attention has one way only."""
        return f"EMA by {self.settings['ema']}"

    def hugging_face_model(self, **special_ids: Any) -> "PreTrainedModel":
        """The same model for transformers, of the shape only."""
        from .modeling_mega import AUTO_MAP, MegaConfig, MegaForMaskedLM  # transformers takes 3 s to import

        settings = {key: value for key, value in self.settings.items() if key != "max_position"}
        config = MegaConfig(**settings, max_positions=self.max_position, auto_map=AUTO_MAP, **special_ids)
        MegaForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")  # has the code saved beside the weights
        return MegaForMaskedLM(config)


class Embeddings(nn.Module):
    """Token embedding; there is no table of positions and no norm."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        # Unfilled first: nn.Embedding's own normal_, on the meta device, would import torch's compiler.
        self.word_embeddings = nn.Embedding.from_pretrained(torch.empty(vocab_size, hidden_size), freeze=False)
        normal_(self.word_embeddings.weight)


class Block(nn.Module):
    """Gated attention, then the MLP; with `two_hop`, the MLP's residual is the block's own input."""

    def __init__(self, mega_layer: GatedAttention, nffn: "NormalizedFFN", two_hop: bool) -> None:
        super().__init__()
        self.mega_layer = mega_layer
        self.nffn = nffn
        self.two_hop = two_hop

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        documents: Documents,
        chunks: Buckets,
        positions: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "_ hidden"]:
        mixed = self.mega_layer(hidden, documents, chunks, positions)
        return (at(hidden, positions) if self.two_hop else mixed) + self.nffn(mixed)


class NormalizedFFN(nn.Module):
    """What the MLP adds to the stream."""

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
    """One of `NORMS`, under the name that it has in transformers."""

    def __init__(self, kind: str, hidden_size: int) -> None:
        super().__init__()
        self.norm = NORMS[kind](hidden_size, eps=NORM_EPS)

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.norm(hidden)


class ScaleNorm(nn.Module):
    """`scalar x / rms(x)`: Nguyen and Salazar 2019, arXiv:1910.05895, with one number for all of a layer."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scalar = nn.Parameter(torch.ones(1))

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return F.rms_norm(hidden, hidden.shape[-1:], eps=self.eps) * self.scalar


NORMS = {"scalenorm": ScaleNorm, "layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


class PredictionHead(nn.Module):
    """From hidden states to what the decoder reads."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        _init_linear(self.dense)

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.dense(hidden).tanh()


def _init_linear(linear: nn.Linear) -> None:
    normal_(linear.weight)
    nn.init.zeros_(linear.bias)
