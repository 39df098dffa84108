"""Rotary position embeddings, half-rotation form: Su et al. 2021, arXiv:2104.09864, equation 34."""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of each token's position."""

    cos: Float[Tensor, "tokens half"]
    sin: Float[Tensor, "tokens half"]


def positions_of(cu_seqlens: Int[Tensor, " docs_plus_1"], tokens: int) -> Int[Tensor, " tokens"]:
    """Position of each token in its document."""
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=tokens)
    return torch.arange(tokens, device=cu_seqlens.device) - starts


@lru_cache(maxsize=8)
def _table(theta: float, head_dim: int, length: int, device: torch.device) -> Rotation:
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies).to(device)
    return Rotation(angles.cos(), angles.sin())


def rotation(theta: float, head_dim: int, positions: Int[Tensor, " tokens"], max_seqlen: int) -> Rotation:
    """The rotation of each token; angles in fp32 whatever the precision of the rest."""
    length = 1 << (max_seqlen - 1).bit_length()  # few sizes, so that the table is made rarely
    table = _table(float(theta), head_dim, length, positions.device)
    return Rotation(table.cos[positions], table.sin[positions])


def rotate(x: Float[Tensor, "tokens heads head_dim"], rotation: Rotation) -> Float[Tensor, "tokens heads head_dim"]:
    """Turn each pair (i, i + head_dim/2) by its token's angle."""
    cos, sin = (part.unsqueeze(1).to(x.dtype) for part in rotation)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotate_into(out: Float[Tensor, "... half_2"], x: Float[Tensor, "... half_2"], rotation: Rotation) -> None:
    """The same, written into `out`, when no gradient is asked for; `rotation` has the shape and precision of the halves."""
    (a, b), (first, second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, rotation.cos, out=first).addcmul_(b, rotation.sin, value=-1)
    torch.mul(b, rotation.cos, out=second).addcmul_(a, rotation.sin)
