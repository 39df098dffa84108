"""MEGA's gated attention: Ma et al. 2022, arXiv:2209.10655, section 3.2, and the two relative biases that it takes.

With x the normalised input and X the input itself, in the paper's symbols (`*` is elementwise). The numbers are those of
Megalodon (arXiv:2404.08801), whose appendix A restates these equations:

    x'    = EMA(x)                                           (12)
    z     = silu(x' W_z + b_z)               shared          (13)
    q, k  = kappa_q * z + mu_q, kappa_k * z + mu_k           (14, 15)
    v     = silu(x W_v + b_v)                                (16)
    o     = softmax(q k^T / tau + bias) v    within a chunk  (17)
    gamma = silu(x' W_gamma + b_gamma)       reset gate      (18)
    phi   = sigmoid(x' W_phi + b_phi)        update gate     (19)
    h     = silu(x' W_h + (gamma * o) U_h + b_h)  candidate  (20)
    y     = phi * h + (1 - phi) * X                          (21)
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernenc.backbones.ema import MultiDimensionDampedEMA
from modernenc.backbones.initial import normal_
from modernenc.kernels.buckets import Buckets, bucket_length
from modernenc.kernels.device import use_gpu_kernels
from modernenc.kernels.documents import Documents
from modernenc.kernels.dropout import Dropout
from modernenc.kernels.toeplitz import toeplitz
from modernenc.shapes import Float, Int


class GatedAttention(nn.Module):
    """Moving average, single-head attention within chunks, and a gated interpolation between the result and the input."""

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
        """Rows of `mx_proj` that make the update gate, z, the reset gate and the candidate's input."""
        self.attention_activation = attention_activation
        self.normalize_attention = normalize_attention
        self.dropout = Dropout(dropout)
        self.hidden_dropout = Dropout(hidden_dropout)
        self.attention_dropout = Dropout(attention_dropout)
        self.norm = norm
        self.ema_gate = ema_gate
        self.v_proj = nn.Linear(hidden_size, intermediate_size)  # W_v
        self.mx_proj = nn.Linear(hidden_size, sum(self.widths))  # W_phi, W_z, W_gamma and W_h, one above the other
        self.h_proj = nn.Linear(intermediate_size, hidden_size)  # U_h
        self.qk_weight = nn.Parameter(torch.empty(2, shared_representation_size))  # kappa_q, kappa_k
        self.qk_bias = nn.Parameter(torch.zeros(2, shared_representation_size))  # mu_q, mu_k
        self.rel_pos_bias = rel_pos_bias
        normal_(self.qk_weight)

    def forward(
        self,
        stream: Float[Tensor, "tokens hidden"],
        documents: Documents,
        chunks: Buckets,
        positions: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "_ hidden"]:
        x = self.norm(stream)
        v = self.hidden_dropout(F.silu(self.v_proj(x)))
        x_ema = self.dropout(self.ema_gate(x, documents))
        phi, z, gamma, candidate_input = self._project(x_ema, positions)
        o = select_positions(self.attend(F.silu(z), v, chunks, documents.causal), positions)
        stream = select_positions(stream, positions)
        candidate = F.silu(candidate_input + self.h_proj(o * F.silu(gamma)))
        # Equation 21 as X + phi (h - X), one fused operation.
        return torch.addcmul(stream, phi.sigmoid(), self.dropout(candidate) - stream)

    def _project(self, x_ema: Tensor, positions: Tensor | None) -> Sequence[Tensor]:
        """Project to update gate, z, reset gate and candidate input, before their activations.

        With `positions`, all but z are needed there only: every token is a key.
        """
        if positions is None:
            return self.mx_proj(x_ema).split(self.widths, dim=-1)
        few = x_ema.index_select(0, positions)
        inputs = (few, x_ema, few, few)
        maps = zip(inputs, self.mx_proj.weight.split(self.widths), self.mx_proj.bias.split(self.widths), strict=True)
        return [F.linear(x, weight, bias) for x, weight, bias in maps]

    def attend(
        self, z: Float[Tensor, "tokens shared"], v: Float[Tensor, "tokens values"], chunks: Buckets, causal: bool
    ) -> Float[Tensor, "tokens values"]:
        """Let each token attend to its chunk, or to the part up to itself: equation 17."""
        # Autocast would take softmax to fp32 and back, at three times the cost.
        with torch.autocast(v.device.type, enabled=False):
            buckets = zip(*(chunks.gather(x) for x in (*self._query_and_key(z), v)), chunks.masks, strict=True)
            return chunks.scatter(
                self.attention_dropout(self.probs(q, k, mask, causal)) @ values for q, k, values, mask in buckets
            )

    def probs(
        self,
        q: Float[Tensor, "chunks length shared"],
        k: Float[Tensor, "chunks length shared"],
        valid: Tensor | None,
        causal: bool = False,
    ) -> Float[Tensor, "chunks length length"]:
        """Compute how much each token attends to each token of its chunk; `valid` tells tokens from padding."""
        length = q.shape[1]
        bias = self.rel_pos_bias(length).to(q.dtype)
        seen = None if valid is None else valid[:, None]
        if causal:  # padding comes after all tokens, which so do not see it
            seen = torch.ones(1, length, length, dtype=torch.bool, device=q.device).tril_()
        if self.attention_activation == "laplace":  # its tau is the number of keys, since nothing normalises its sum
            keys = length if seen is None else seen.sum(-1, keepdim=True)
            probs = _laplace(q @ k.transpose(1, 2) / keys + bias)
            return probs if seen is None else probs * seen
        scores = torch.baddbmm(bias, q, k.transpose(1, 2))
        if seen is not None:
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        return scores.softmax(-1)

    def _query_and_key(self, z: Float[Tensor, "tokens shared"]) -> tuple[Tensor, Tensor]:
        """Scale and shift z to queries and keys, equations 14 and 15; or normalise it first, Megalodon's equations 6 to 8.

        kappa is then stored less 1, as Megalodon stores the scales of its norms; unlike there, z keeps its SiLU. Queries of
        softmax are divided by its tau, unless scores are cosines, whose temperature is learned.
        """
        kappa, mu = self.qk_weight.to(z.dtype), self.qk_bias.to(z.dtype)
        if self.normalize_attention:
            z, kappa = F.normalize(z, dim=-1), kappa + 1
        q, k = z * kappa[0] + mu[0], z * kappa[1] + mu[1]
        by_tau = self.attention_activation == "softmax" and not self.normalize_attention
        return q * q.shape[-1] ** -0.5 if by_tau else q, k


class SimpleBias(nn.Module):
    """One learned number per distance of two tokens."""

    def __init__(self, chunk_size: int, max_position: int, width: int) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        # Only the first 2 x chunk_size - 1 are ever used. transformers has as many as for all positions, and so has every
        # checkpoint trained there.
        self.rel_pos_bias = nn.Parameter(torch.empty(2 * max_position - 1))
        normal_(self.rel_pos_bias)

    def forward(self, length: int) -> Float[Tensor, "length length"]:
        return toeplitz(self.rel_pos_bias[self.chunk_size - length : self.chunk_size + length - 1])


class RotaryBias(nn.Module):
    """The product of two learned vectors, each rotated by its token's position: a bias by distance from 2 x `width` numbers."""

    def __init__(self, chunk_size: int, max_position: int, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, width))
        self.b_param = nn.Parameter(torch.empty(1, width))
        self.register_buffer("_float_tensor", torch.zeros(1))  # unused, but part of transformers' state dict
        normal_(self.alpha)
        normal_(self.b_param)

    def forward(self, length: int) -> Float[Tensor, "length length"]:
        half = self.alpha.shape[1] // 2
        frequencies = torch.exp(torch.arange(half, device=self.alpha.device) * (-math.log(10_000) / half))
        angles = torch.outer(torch.arange(length, device=self.alpha.device), frequencies)
        return _rotate(self.alpha, angles) @ _rotate(self.b_param, angles).T


BIASES = {"simple": SimpleBias, "rotary": RotaryBias}


def chunks_of(documents: Documents, chunk_size: int, compiled: bool = False) -> Buckets:
    """Cut each document into chunks from its start, so that they do not depend on what else is in the batch.

    On a GPU they are padded to few lengths, which costs 2 % more in products and saves most of the kernels. For layers that are
    compiled, there is a bucket of each length in any batch, so that one graph serves all.
    """
    starts = ((length, start) for length in documents.lengths for start in range(0, length, chunk_size))
    lengths = [min(chunk_size, length - start) for length, start in starts]
    on_gpu = use_gpu_kernels(documents.device)
    padded_to = [8 * -(-eighths * chunk_size // 64) for eighths in (1, 2, 4, 6, 8)] if on_gpu else map(bucket_length, lengths)
    # A chunk padded beyond `chunk_size` would need biases of distances that no two tokens of a chunk have. Torch's compiler
    # makes graphs of their own for buckets of no row and of one.
    return Buckets(lengths, documents.device, {min(length, chunk_size) for length in padded_to}, min_rows=2 * compiled)


def select_positions(x: Tensor, positions: Tensor | None) -> Tensor:
    """Return the rows at `positions`, or all if None."""
    return x if positions is None else x.index_select(0, positions)


def _laplace(scores: Tensor) -> Tensor:
    """Compute the distribution function of a normal with mean sqrt(1/2) and variance 1/(4 pi), MEGA's Laplace function."""
    return 0.5 * (1 + torch.erf((scores - math.sqrt(0.5)) / (math.sqrt(0.25 / math.pi) * math.sqrt(2))))


def _rotate(vector: Float[Tensor, "1 width"], angles: Float[Tensor, "length half"]) -> Float[Tensor, "length width"]:
    a, b = vector.chunk(2, dim=1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=1)
