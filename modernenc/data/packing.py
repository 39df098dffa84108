"""Documents -> chunks -> rows: cut what is too long, lose nothing, leave few gaps."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from modernenc.data.blocks import Block

SPECIALS = 2
"""Tokens added around each chunk: cls before, sep after."""

_SMALLEST = SPECIALS + 1


def cut(block: Block, seq_len: int) -> list[Integer[np.ndarray, " tokens"]]:
    """The documents of a block, each cut into consecutive chunks of at most `seq_len` - 2 tokens."""
    longest = seq_len - SPECIALS
    chunks = []
    start = 0
    for end in block.ends.tolist():
        chunks.extend(block.tokens[at : min(at + longest, end)] for at in range(start, end, longest))
        start = end
    return chunks


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Fill rows of `seq_len` by best-fit-decreasing; each row lists positions in `lengths`, which count special tokens.

    The longest first, each into the row where it leaves the least room. Ding et al. 2024, arXiv:2404.10830, section 3.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = lengths[item]
        best = bisect_left(room, (length, -1))
        if best < len(room):
            left, row = room.pop(best)
        else:
            left, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(item)
        if left - length >= _SMALLEST:
            insort(room, (left - length, row))
    return rows
