"""Rows -> micro-batches: add special tokens around each chunk, choose and replace the predicted tokens, lay them end to end."""

from collections.abc import Sequence

import numpy as np
import xxhash
from jaxtyping import Bool, Integer

from modernenc.data.batch import MicroBatch
from modernenc.data.blocks import Roles
from modernenc.data.lanes import Row
from modernenc.data.packing import SPECIALS

MASK_FRACTION, RANDOM_FRACTION = 0.8, 0.1
"""Fractions of the predicted tokens that are replaced by the mask token and by a random one; the rest stay as they are.
Devlin et al. 2018, arXiv:1810.04805, section 3.1."""
_LOW = np.uint64(2**32 - 1)
_MASKED, _REPLACED = np.uint64(MASK_FRACTION * 2**32), np.uint64((MASK_FRACTION + RANDOM_FRACTION) * 2**32)


def lay_out(
    rows: Sequence[Row], roles: Roles
) -> tuple[Integer[np.ndarray, " tokens"], Integer[np.ndarray, " docs_plus_1"], Bool[np.ndarray, " tokens"]]:
    """Lay rows end to end, each chunk between cls and sep.

    Returns the ids, 0 with the end of each document, and which tokens are text. Without rows, there is one empty document: a
    rank without rows must still run a forward pass.
    """
    chunks = [chunk.tokens for row in rows for chunk in row] or [np.empty(0, np.uint16)]
    lengths = np.array([len(tokens) for tokens in chunks]) + SPECIALS
    ends = lengths.cumsum()
    starts = ends - lengths
    input_ids, is_text = np.empty(ends[-1], np.int64), np.ones(ends[-1], bool)
    for tokens, start in zip(chunks, starts.tolist(), strict=True):
        input_ids[start + 1 : start + 1 + len(tokens)] = tokens
    input_ids[starts], input_ids[ends - 1] = roles.cls, roles.sep
    is_text[starts], is_text[ends - 1] = False, False
    return input_ids, np.concatenate(([0], ends)), is_text


class Masker:
    """Chooses the tokens to predict; the choice in a row is a function of the row's seed alone.

    The positions chosen at one ratio include those chosen at a lower one. Special tokens are never chosen.
    """

    def __init__(self, roles: Roles, ordinary_ids: Integer[np.ndarray, " ids"], ratio: float) -> None:
        self.roles = roles
        self.ordinary_ids = ordinary_ids
        self._threshold = np.uint64(ratio * 2.0**64)
        self._random = np.random.Philox(key=0)
        self._fresh = self._random.state

    def batch(self, rows: Sequence[Row], seeds: Sequence[tuple[int, ...]], first_row: int) -> MicroBatch:
        """Lay rows end to end, each chunk between cls and sep, and mask them."""
        input_ids, ends, is_text = lay_out(rows, self.roles)
        sizes = [sum(len(chunk.tokens) + SPECIALS for chunk in row) for row in rows]
        drawn_words = [self._draw_words(seed, size) for seed, size in zip(seeds, sizes, strict=True)]
        words = np.concatenate(drawn_words or [np.zeros(SPECIALS, np.uint64)])
        positions = ((words < self._threshold) & is_text).nonzero()[0]
        targets = input_ids[positions]
        # The low 32 bits pick the replacement. They are independent of the high bits, which picked the position.
        kind = words[positions] & _LOW
        input_ids[positions[kind < _MASKED]] = self.roles.mask
        random = ((kind >= _MASKED) & (kind < _REPLACED)).nonzero()[0]
        drawn = (kind[random] - _MASKED) * np.uint64(len(self.ordinary_ids)) // (_REPLACED - _MASKED)
        input_ids[positions[random]] = self.ordinary_ids[drawn]
        return MicroBatch.of(input_ids, ends, positions, targets, first_row)

    def _draw_words(self, seed: tuple[int, ...], count: int) -> Integer[np.ndarray, " count"]:
        """Draw 64-bit random words from the counter-based generator of Salmon et al. 2011, keyed by a hash of the seed."""
        key = xxhash.xxh3_128_digest(np.asarray(seed, np.int64).tobytes())
        self._fresh["state"]["key"] = np.frombuffer(key, np.uint64)
        self._random.state = self._fresh  # takes a third of the time of a new generator
        return self._random.random_raw(count)
