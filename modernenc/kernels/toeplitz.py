"""Toeplitz matrices from their diagonals, without the gradient of `unfold`, which is slow on a GPU."""

import torch.nn.functional as F
from torch import Tensor

from modernenc.shapes import Float


def toeplitz(diagonals: Float[Tensor, "*batch diagonals"]) -> Float[Tensor, "*batch n n"]:
    """Return the matrices `out[i, j] = diagonals[n - 1 + j - i]`, of n rows from 2n - 1 diagonals.

    Numbers repeated with a period of 2n, and read in rows of 2n - 1, move by one from row to row. So the gradient is a sum over
    rows, which is the same each time.
    """
    n = (diagonals.shape[-1] + 1) // 2
    periods = F.pad(diagonals, (0, 1)).unsqueeze(-2).expand(*diagonals.shape[:-1], n, 2 * n).flatten(-2)
    return periods[..., n - 1 : -1].unflatten(-1, (n, 2 * n - 1))[..., :n]
