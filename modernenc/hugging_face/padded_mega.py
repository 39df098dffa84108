"""MEGA on padded rows, for graphs that know no documents: what `MegaForMaskedLM` computes, by operations of fixed shapes.

The moving average is one convolution with its kernel written out, at a cost that is quadratic in length. Chunks are counted
from the start of a row, so that rows must be padded at their end.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernenc.shapes import Float


class PaddedMega(nn.Module):
    """Logits of `model`, a `MegaForMaskedLM`, for rows that are padded at their end."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.layers = nn.ModuleList(_PaddedLayer(layer, model.mega.chunk_size) for layer in model.mega.layers)
        self.chunk_size = model.mega.chunk_size

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        missing = -length % self.chunk_size
        hidden = F.pad(self.model.mega.embedding_layer.word_embeddings(input_ids), (0, 0, 0, missing))
        kept = F.pad(attention_mask, (0, missing)).bool()
        for layer in self.layers:
            hidden = layer(hidden, kept)
        return self.model.mlm_head(self.model.dense(hidden[:, :length]).tanh())


class _PaddedLayer(nn.Module):
    def __init__(self, layer: Any, chunk_size: int) -> None:
        super().__init__()
        self.layer = layer
        self.chunk_size = chunk_size

    def forward(self, stream: Tensor, kept: Tensor) -> Tensor:
        gated = self.layer.mega_layer
        x = torch.where(kept[..., None], gated.norm(stream), 0.0)  # padding must not enter the average
        v = F.silu(gated.v_proj(x))
        averaged = F.silu(_average(x, gated.ema_gate) + x * gated.ema_gate.residual_weight)
        phi, z, gamma, candidate_input = gated.mx_proj(averaged).split(gated.widths, dim=-1)
        o = self._attend(F.silu(z), v, kept)
        candidate = F.silu(candidate_input + gated.h_proj(o * F.silu(gamma)))
        attended = stream + phi.sigmoid() * (candidate - stream)
        return (stream if self.layer.two_hop else attended) + self.layer.nffn(attended)

    def _attend(self, z: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        gated = self.layer.mega_layer
        parts = (*gated._query_and_key(z), v, kept)
        q, k, values, valid = (x.reshape(-1, self.chunk_size, *x.shape[2:]) for x in parts)
        return (gated.probs(q, k, valid) @ values).reshape(v.shape)


def _average(x: Float[Tensor, "rows length hidden"], ema: Any) -> Float[Tensor, "rows length hidden"]:
    """Convolve rows with the kernels of both directions, from the farthest token ahead to the farthest one before."""
    length = x.shape[1]
    log_decay, gain = ema.coefficients(x.dtype)
    taps = (gain[..., None] * (log_decay[..., None] * torch.arange(length)).exp()).sum(2)  # (2, hidden, length)
    kernel = torch.cat((taps[0].flip(-1)[:, :-1], taps.sum(0)[:, :1], taps[1, :, 1:]), dim=-1)
    padded = F.pad(x.transpose(1, 2), (length - 1, length - 1))  # by itself, since a convolution's padding has to be a constant
    return F.conv1d(padded, kernel[:, None], groups=x.shape[2]).transpose(1, 2)
