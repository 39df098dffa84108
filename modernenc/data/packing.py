"""Documents -> chunks -> rows: cut long documents, lose no token, and leave few gaps."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from modernenc.data.blocks import Block

SPECIALS = 2
"""Special tokens added to each chunk: cls before it, sep after it."""

_SMALLEST = SPECIALS + 1


def cut(block: Block, seq_len: int) -> list[Integer[np.ndarray, " tokens"]]:
    """Cut each document of a block into consecutive chunks of at most `seq_len - SPECIALS` tokens."""
    longest = seq_len - SPECIALS
    chunks = []
    start = 0
    for end in block.ends.tolist():
        chunks.extend(block.tokens[at : min(at + longest, end)] for at in range(start, end, longest))
        start = end
    return chunks


def pack(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Pack items into rows of `seq_len` by best-fit-decreasing; each row lists indices into `lengths`.

    Items are placed from the longest to the shortest, each in the row where it leaves the least room; `lengths` include the
    special tokens. Ding et al. 2024, arXiv:2404.10830, section 3.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    # A stable sort: the order of equally long items, and so every row, is the same on any machine.
    for item in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = lengths[item]
        best = bisect_left(room, (length, -1))
        if best < len(room):
            left, row = room.pop(best)
        else:
            left, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(item)
        if left - length >= _SMALLEST:  # a fuller row can take no other item, so it leaves the list
            insort(room, (left - length, row))
    return rows
