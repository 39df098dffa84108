"""Rows -> micro-batches: special tokens around each chunk, masks, and the unpadded layout."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash
from jaxtyping import Int, Integer
from torch import Tensor

from modernenc.curriculum import MASKED_LM
from modernenc.data.blocks import Roles
from modernenc.data.lanes import Row
from modernenc.data.packing import SPECIALS

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Fractions of the predicted tokens that become the mask token and a random token; the rest keep their token. Devlin et al.
2018, arXiv:1810.04805, section 3.1."""
_LOW = np.uint64(2**32 - 1)
_MASKED, _REPLACED = np.uint64(MASK_SHARE * 2**32), np.uint64((MASK_SHARE + RANDOM_SHARE) * 2**32)


@dataclass
class MicroBatch:
    """Rows of documents laid end to end, without padding."""

    input_ids: Int[Tensor, " tokens"]
    cu_seqlens: Int[Tensor, " docs_plus_1"]
    """Start of each document, and the number of tokens; int32."""
    max_seqlen: int
    target_positions: Int[Tensor, " positions"]
    """Where hidden states are asked for: at each predicted token; for a task, at the first token of each choice."""
    targets: Int[Tensor, " targets"]
    """What they should tell: the token of each position, or the right choice of each item."""
    first_row: int
    """Number of the first row in its phase: with the step, the seed of dropout."""
    objective: str = MASKED_LM
    """What the rows are for."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device, but for `cu_seqlens`: what follows from it is worked out on the processor."""
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in self._moving()})

    def pin_memory(self) -> "MicroBatch":
        """The same with what moves to a device in memory that a GPU copies from while it computes."""
        return replace(self, **{name: value.pin_memory() for name, value in self._moving()})

    def _moving(self) -> list[tuple[str, Tensor]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Tensor) and name != "cu_seqlens"]


class Masker:
    """Choose the tokens to predict in each row, as a function of the row's seed alone.

    The positions chosen at one ratio include those chosen at any lower one. Special tokens are never chosen.
    """

    def __init__(self, roles: Roles, ordinary_ids: Integer[np.ndarray, " ids"], ratio: float) -> None:
        self.roles = roles
        self.ordinary_ids = ordinary_ids
        self._threshold = np.uint64(ratio * 2.0**64)
        self._random = np.random.Philox(key=0)
        self._fresh = self._random.state

    def batch(self, rows: Sequence[Row], seeds: Sequence[tuple[int, ...]], first_row: int) -> MicroBatch:
        """Rows end to end, each chunk between cls and sep, masked; without rows an empty document with nothing to predict."""
        chunks = [chunk.tokens for row in rows for chunk in row] or [np.empty(0, np.uint16)]
        lengths = np.array([len(tokens) for tokens in chunks]) + SPECIALS
        ends = lengths.cumsum()
        starts = ends - lengths
        input_ids = np.empty(ends[-1], np.int64)
        for tokens, start in zip(chunks, starts.tolist(), strict=True):
            input_ids[start + 1 : start + 1 + len(tokens)] = tokens
        input_ids[starts], input_ids[ends - 1] = self.roles.cls, self.roles.sep
        words = np.zeros(ends[-1], np.uint64)
        first = 0
        for last, seed in zip(ends[np.cumsum([len(row) for row in rows], dtype=int) - 1].tolist(), seeds, strict=True):
            words[first:last] = self._words(seed, last - first)
            first = last
        chosen = words < self._threshold
        chosen[starts], chosen[ends - 1] = False, False
        positions = chosen.nonzero()[0]
        targets = input_ids[positions]
        # The low 32 bits pick the replacement; they are independent of the high bits, which picked the position.
        kind = words[positions] & _LOW
        input_ids[positions[kind < _MASKED]] = self.roles.mask
        random = ((kind >= _MASKED) & (kind < _REPLACED)).nonzero()[0]
        drawn = (kind[random] - _MASKED) * np.uint64(len(self.ordinary_ids)) // (_REPLACED - _MASKED)
        input_ids[positions[random]] = self.ordinary_ids[drawn]
        return MicroBatch(
            input_ids=torch.from_numpy(input_ids),
            cu_seqlens=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
            max_seqlen=int(lengths.max()),
            target_positions=torch.from_numpy(positions),
            targets=torch.from_numpy(targets),
            first_row=first_row,
        )

    def _words(self, seed: tuple[int, ...], count: int) -> Integer[np.ndarray, " count"]:
        """Return random 64-bit words of the counter-based Philox generator (Salmon et al. 2011), keyed by a hash of `seed`."""
        key = xxhash.xxh3_128_digest(np.asarray(seed, np.int64).tobytes())
        self._fresh["state"]["key"] = np.frombuffer(key, np.uint64)
        self._random.state = self._fresh  # resetting the state takes a third of the time of a new generator
        return self._random.random_raw(count)
