"""Rotary position embeddings in the half-rotation form: Su et al. 2021, arXiv:2104.09864, equation 34.

Pair i of a head's dimensions, (i, i + head_dim/2), is turned by the angle position * theta^(-2i/head_dim). The product of a
rotated query and a rotated key then depends on their distance only.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of the angles at each token's position."""

    cos: Float[Tensor, "tokens half"]
    sin: Float[Tensor, "tokens half"]


def positions_of(cu_seqlens: Int[Tensor, " docs_plus_1"], tokens: int) -> Int[Tensor, " tokens"]:
    """Return the position of each token in its document."""
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=tokens)
    return torch.arange(tokens, device=cu_seqlens.device) - starts


@lru_cache(maxsize=8)
def _table(theta: float, head_dim: int, length: int, device: torch.device) -> Rotation:
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies).to(device)
    return Rotation(angles.cos(), angles.sin())


def rotation(theta: float, head_dim: int, positions: Int[Tensor, " tokens"], max_seqlen: int) -> Rotation:
    """Return the rotation of each token. Angles are in fp32 whatever the precision of the rest: bf16 counts to 256 only."""
    length = 1 << (max_seqlen - 1).bit_length()  # a power of two, so that few tables are ever computed
    table = _table(float(theta), head_dim, length, positions.device)
    return Rotation(table.cos[positions], table.sin[positions])


def rotate(x: Float[Tensor, "tokens heads head_dim"], rotation: Rotation) -> Float[Tensor, "tokens heads head_dim"]:
    """Turn each pair (i, i + head_dim/2) by its token's angle."""
    cos, sin = (part.unsqueeze(1).to(x.dtype) for part in rotation)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
