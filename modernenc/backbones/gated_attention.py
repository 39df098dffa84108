"""MEGA's gated attention: equations 5 to 17 of Ma et al. 2022, arXiv:2209.10655, and the biases by distance that it takes."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .buckets import Buckets
from .dropout import Dropout
from .ema import Documents, MultiDimensionDampedEMA
from .initial import normal_
from .shapes import Float, Int


class GatedAttention(nn.Module):
    """Moving average, one-headed attention within chunks, and a gated way between the result and the input: equations 6-14."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        shared_representation_size: int,
        norm: nn.Module,
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
        self.norm = norm
        self.ema_gate = ema_gate
        self.v_proj = nn.Linear(hidden_size, intermediate_size)
        self.mx_proj = nn.Linear(hidden_size, sum(self.widths))
        self.h_proj = nn.Linear(intermediate_size, hidden_size)
        self.qk_weight = nn.Parameter(torch.empty(2, shared_representation_size))
        self.qk_bias = nn.Parameter(torch.zeros(2, shared_representation_size))
        self.rel_pos_bias = rel_pos_bias
        normal_(self.qk_weight)

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
        attended = at(self.attend(F.silu(shared), value, chunks), positions)
        hidden = at(hidden, positions)
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
            parts = zip(chunks.gather(shared), chunks.gather(value), chunks.valid, chunks.shortest, strict=True)
            return chunks.scatter(
                self.attention_dropout(self._weights(part, None if shortest == part.shape[1] else valid)) @ values
                for part, values, valid, shortest in parts
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


class SimpleBias(nn.Module):
    """A learned number per distance, added to the scores."""

    def __init__(self, chunk_size: int, max_position: int, width: int) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        # Only the first 2 x chunk_size - 1 are ever used; transformers has as many as there are positions, and so has each
        # checkpoint that was trained there.
        self.rel_pos_bias = nn.Parameter(torch.empty(2 * max_position - 1))
        normal_(self.rel_pos_bias)

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
        normal_(self.alpha)
        normal_(self.b_param)

    def forward(self, length: int) -> Float[Tensor, "length length"]:
        half = self.alpha.shape[1] // 2
        frequencies = torch.exp(torch.arange(half, device=self.alpha.device) * (-math.log(10_000) / half))
        angles = torch.outer(torch.arange(length, device=self.alpha.device), frequencies)
        return _rotated(self.alpha, angles) @ _rotated(self.b_param, angles).T


BIASES = {"simple": SimpleBias, "rotary": RotaryBias}


def chunks_of(documents: Documents, chunk_size: int) -> Buckets:
    """Documents cut into chunks from their starts on."""
    starts = ((length, start) for length in documents.lengths for start in range(0, length, chunk_size))
    return Buckets([min(chunk_size, length - start) for length, start in starts], documents.device)


def at(x: Tensor, positions: Tensor | None) -> Tensor:
    """The rows of some positions, or all."""
    return x if positions is None else x.index_select(0, positions)


def _laplace(scores: Tensor) -> Tensor:
    """The cumulative normal distribution that is closest to a squared ReLU: equation 17."""
    return 0.5 * (1 + torch.erf((scores - math.sqrt(0.5)) / (math.sqrt(0.25 / math.pi) * math.sqrt(2))))


def _rotated(vector: Float[Tensor, "1 width"], angles: Float[Tensor, "length half"]) -> Float[Tensor, "length width"]:
    a, b = vector.chunk(2, dim=1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=1)
