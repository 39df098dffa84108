"""MEGA: Ma et al. 2022, arXiv:2209.10655. Parameter names are those of transformers' `MegaModel`.

Each block smooths the normalised stream by an EMA, attends within chunks by one gated head, and moves the stream towards the
result by a learned share; a plain MLP follows. Only the EMA crosses chunks, which are counted from each document's start.
"""

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .buckets import Buckets
from .dropout import Dropout
from .ema import BLOCK, PATHS, Documents, MultiDimensionDampedEMA
from .shapes import Float, Int

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INIT_STD = 0.02
_PUBLISHED = {
    "bidirectional": True, "truncation": None, "activation": "silu", "normalize_before_mega": True,
    "normalize_before_ffn": True, "use_normalized_ffn": True, "add_token_type_embeddings": False,
    "add_lm_hidden_dense_layer": True,
}  # fmt: skip
"""What is the same in every MEGA here, by transformers' names."""
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
                    normalization_type,
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
        documents = Documents(cu_seqlens)
        chunks = Buckets(chunk_edges(documents, self.chunk_size))
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
        for key, expected in _PUBLISHED.items():
            if config.get(key, expected) != expected:
                raise ValueError(f"{key}={config[key]} in config.json: MEGA has {expected} here")
        if config["model_type"] == "mega" and config.get("normalization_type") == "rmsnorm":
            raise ValueError("normalization_type=rmsnorm in config.json: in transformers' MEGA it does nothing, here it does")
        names = set(inspect.signature(cls.__init__).parameters) - {"self", "max_position"}
        settings = {name: config[name] for name in names if name in config}
        if not config.get("use_chunking", True):
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


def chunk_edges(documents: Documents, chunk_size: int) -> Int[Tensor, " chunks_plus_1"]:
    """Where chunks begin and end: documents are cut from their starts on."""
    edges = [0]
    for length in documents.lengths:
        start = edges[-1]
        edges.extend(range(start + chunk_size, start + length, chunk_size))
        edges.append(start + length)
    return torch.tensor(edges, dtype=torch.int32, device=documents.device)


class Embeddings(nn.Module):
    """Token embedding; there is no table of positions and no norm."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        # Unfilled first: nn.Embedding's own normal_, on the meta device, would import torch's compiler.
        self.word_embeddings = nn.Embedding.from_pretrained(torch.empty(vocab_size, hidden_size), freeze=False)
        nn.init.normal_(self.word_embeddings.weight, std=INIT_STD)


class Block(nn.Module):
    """Gated attention, then the MLP; with `two_hop`, the MLP's residual is the block's own input."""

    def __init__(self, mega_layer: "GatedAttention", nffn: "NormalizedFFN", two_hop: bool) -> None:
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
        return (_at(hidden, positions) if self.two_hop else mixed) + self.nffn(mixed)


class GatedAttention(nn.Module):
    """Moving average, one-headed attention within chunks, and a gated way between the result and the input: equations 6-14."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        shared_representation_size: int,
        normalization_type: str,
        ema_gate: MultiDimensionDampedEMA,
        rel_pos_bias: nn.Module,
        attention_activation: str,
        normalize_attention: bool,
        dropout: float,
        hidden_dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.widths = (hidden_size, shared_representation_size, intermediate_size, hidden_size)
        self.attention_activation = attention_activation
        self.normalize_attention = normalize_attention
        self.dropout = Dropout(dropout)
        self.hidden_dropout = Dropout(hidden_dropout)
        self.attention_dropout = Dropout(attention_dropout)
        self.norm = Norm(normalization_type, hidden_size)
        self.ema_gate = ema_gate
        self.v_proj = nn.Linear(hidden_size, intermediate_size)
        self.mx_proj = nn.Linear(hidden_size, sum(self.widths))
        self.h_proj = nn.Linear(intermediate_size, hidden_size)
        self.qk_weight = nn.Parameter(torch.empty(2, shared_representation_size))
        self.qk_bias = nn.Parameter(torch.zeros(2, shared_representation_size))
        self.rel_pos_bias = rel_pos_bias
        nn.init.normal_(self.qk_weight, std=INIT_STD)

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        documents: Documents,
        chunks: Buckets,
        positions: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "_ hidden"]:
        normed = self.norm(hidden)
        value = self.hidden_dropout(F.silu(self.v_proj(normed)))
        smoothed = self.dropout(self.ema_gate(normed, documents))
        towards, shared, gate, kept = self._maps(smoothed, positions)
        attended = _at(self.attend(F.silu(shared), value, chunks), positions)
        hidden = _at(hidden, positions)
        new = F.silu(kept + self.h_proj(attended * F.silu(gate)))
        return torch.addcmul(hidden, towards.sigmoid(), self.dropout(new) - hidden)

    def _maps(self, smoothed: Tensor, positions: Tensor | None) -> Sequence[Tensor]:
        """What the input gives to the way, queries and keys, the gate, and the result; at `positions`, but for the second."""
        if positions is None:
            return self.mx_proj(smoothed).split(self.widths, dim=-1)
        few = smoothed.index_select(0, positions)
        inputs = (few, smoothed, few, few)
        maps = zip(inputs, self.mx_proj.weight.split(self.widths), self.mx_proj.bias.split(self.widths), strict=True)
        return [F.linear(x, weight, bias) for x, weight, bias in maps]

    def attend(
        self, shared: Float[Tensor, "tokens shared"], value: Float[Tensor, "tokens values"], chunks: Buckets
    ) -> Float[Tensor, "tokens values"]:
        """Attention of each token over its chunk."""
        # Autocast would take softmax to fp32 and back, for three times the cost.
        with torch.autocast(value.device.type, enabled=False):
            parts = zip(chunks.gather(shared), chunks.gather(value), chunks.valid, chunks.full, strict=True)
            return chunks.scatter(
                self.attention_dropout(self._weights(part, None if full else valid)) @ values
                for part, values, valid, full in parts
            )

    def _weights(self, shared: Tensor, valid: Tensor | None) -> Tensor:
        """How much each token takes from each of its chunk; `valid` says which are tokens."""
        query, key = self._query_and_key(shared)
        bias = self.rel_pos_bias(shared.shape[1]).to(shared.dtype)
        if self.attention_activation == "laplace":
            counts = shared.shape[1] if valid is None else valid.sum(1)[:, None, None]
            weights = _laplace(query @ key.transpose(1, 2) / counts + bias)
            return weights if valid is None else weights * valid[:, None]
        if not self.normalize_attention:  # else their products are cosines, with a learned temperature
            query = query * query.shape[-1] ** -0.5
        scores = torch.baddbmm(bias, query, key.transpose(1, 2))
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], torch.finfo(scores.dtype).min)
        return scores.softmax(-1)

    def _query_and_key(self, shared: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.qk_weight.to(shared.dtype), self.qk_bias.to(shared.dtype)
        if self.normalize_attention:
            shared, scale = F.normalize(shared, dim=-1), scale + 1
        return shared * scale[0] + shift[0], shared * scale[1] + shift[1]


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


class SimpleBias(nn.Module):
    """A learned number per distance, added to the scores."""

    def __init__(self, chunk_size: int, max_position: int, width: int) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        # Only the first 2 x chunk_size - 1 are ever used; transformers has as many as there are positions, and so has each
        # checkpoint that was trained there.
        self.rel_pos_bias = nn.Parameter(torch.empty(2 * max_position - 1))
        nn.init.normal_(self.rel_pos_bias, std=INIT_STD)

    def forward(self, length: int) -> Float[Tensor, "length length"]:
        reach = self.rel_pos_bias[self.chunk_size - length : self.chunk_size + length - 1]
        return reach.unfold(0, length, 1).flip(0)


class RotaryBias(nn.Module):
    """A bias by distance of which rotations know `width` numbers only: the product of two rotated vectors."""

    def __init__(self, chunk_size: int, max_position: int, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, width))
        self.b_param = nn.Parameter(torch.empty(1, width))
        self.register_buffer("_float_tensor", torch.zeros(1))  # weights in transformers' form have one
        nn.init.normal_(self.alpha, std=INIT_STD)
        nn.init.normal_(self.b_param, std=INIT_STD)

    def forward(self, length: int) -> Float[Tensor, "length length"]:
        half = self.alpha.shape[1] // 2
        frequencies = torch.exp(torch.arange(half, device=self.alpha.device) * (-math.log(10_000) / half))
        angles = torch.outer(torch.arange(length, device=self.alpha.device), frequencies)
        return _rotated(self.alpha, angles) @ _rotated(self.b_param, angles).T


BIASES = {"simple": SimpleBias, "rotary": RotaryBias}


class PredictionHead(nn.Module):
    """From hidden states to what the decoder reads."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        _init_linear(self.dense)

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.dense(hidden).tanh()


def _at(x: Tensor, positions: Tensor | None) -> Tensor:
    return x if positions is None else x.index_select(0, positions)


def _laplace(scores: Tensor) -> Tensor:
    """The cumulative normal distribution that is closest to a squared ReLU: equation 17."""
    return 0.5 * (1 + torch.erf((scores - math.sqrt(0.5)) / (math.sqrt(0.25 / math.pi) * math.sqrt(2))))


def _rotated(vector: Float[Tensor, "1 width"], angles: Float[Tensor, "length half"]) -> Float[Tensor, "length width"]:
    a, b = vector.chunk(2, dim=1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=1)


def _init_linear(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, std=INIT_STD)
    nn.init.zeros_(linear.bias)
