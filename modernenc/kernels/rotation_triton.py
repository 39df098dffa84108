"""The Triton kernel of `modernenc.kernels.rotation`."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""Tokens that a program rotates, of one head: some 100 numbers for each of its threads."""


def rotate(sources: Sequence[Tensor], results: Sequence[Tensor], cos: Tensor, sin: Tensor, sign: int) -> None:
    """Rotate the first two of three tensors by `sign` times their tokens' angles, and copy the third.

    All are (tokens, heads, head_dim), `cos` and `sin` (tokens, head_dim/2). A head's numbers must lie side by side.
    """
    tokens, heads, head_dim = sources[0].shape
    if not tokens:
        return
    kernel: Any = _rotate[heads, triton.cdiv(tokens, ROWS)]
    kernel(
        *sources, *sources[0].stride()[:2], *results, *results[0].stride()[:2], cos.contiguous(), sin.contiguous(), tokens,
        SIGN=sign, HALF=head_dim // 2, COLUMNS=triton.next_power_of_2(head_dim // 2), ROWS=ROWS,
    )  # fmt: skip


@triton.jit
def _rotate(
    q, k, v, token_stride, head_stride, q_result, k_result, v_result, result_token_stride, result_head_stride, cos, sin, tokens,
    SIGN: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rotate some tokens of one head, in fp32."""
    head = tl.program_id(0)  # programs side by side share the angles
    token, column = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64), tl.arange(0, COLUMNS)
    there = (token < tokens)[:, None] & (column < HALF)[None, :]
    angle = token[:, None] * HALF + column[None, :]
    c = tl.load(cos + angle, there, 0.0).to(tl.float32)
    s = tl.load(sin + angle, there, 0.0).to(tl.float32) * SIGN
    place = token[:, None] * token_stride + head * head_stride + column[None, :]
    result = token[:, None] * result_token_stride + head * result_head_stride + column[None, :]
    _rotate_part(q + place, q_result + result, c, s, there, HALF)
    _rotate_part(k + place, k_result + result, c, s, there, HALF)
    tl.store(v_result + result, tl.load(v + place, there, 0.0), there)
    tl.store(v_result + HALF + result, tl.load(v + HALF + place, there, 0.0), there)


@triton.jit
def _rotate_part(source, result, c, s, there, HALF: tl.constexpr):
    a, b = tl.load(source, there, 0.0).to(tl.float32), tl.load(source + HALF, there, 0.0).to(tl.float32)
    tl.store(result, a * c - b * s, there)
    tl.store(result + HALF, b * c + a * s, there)
