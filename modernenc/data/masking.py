"""Rows -> micro-batches: special tokens around each chunk, masks, and the unpadded layout."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from modernenc.curriculum import MASKED_LM
from modernenc.data.blocks import Roles
from modernenc.data.lanes import Row
from modernenc.data.packing import SPECIALS

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Of the predicted tokens: replaced by the mask token, by a random one; the rest stay. Devlin et al. 2018, section 3.1."""


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
        """The same on another device."""
        tensors = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class MaskedRow:
    """One row after masking."""

    input_ids: Integer[np.ndarray, " tokens"]
    lengths: list[int]
    """Tokens of each document, special tokens included."""
    target_positions: Integer[np.ndarray, " targets"]
    targets: Integer[np.ndarray, " targets"]


class Masker:
    """Choose what to predict, as a function of (seed, row) alone.

    The positions chosen at one ratio include those chosen at a lower one; special tokens are never chosen.
    """

    def __init__(self, roles: Roles, ordinary_ids: Integer[np.ndarray, " ids"], ratio: float) -> None:
        self.roles = roles
        self.ordinary_ids = ordinary_ids
        self.ratio = ratio

    def mask(self, row: Row, seed: tuple[int, ...]) -> MaskedRow:
        """Wrap the chunks of a row in cls and sep, and mask it."""
        input_ids, text = self._wrap(row)
        rng = np.random.default_rng(seed)
        draw, kind = rng.random((2, len(input_ids)))
        positions = np.flatnonzero((draw < self.ratio) & text)
        targets = input_ids[positions]
        masked = kind[positions] < MASK_SHARE
        random = (kind[positions] >= MASK_SHARE) & (kind[positions] < MASK_SHARE + RANDOM_SHARE)
        replacement = np.where(masked, self.roles.mask, targets)
        replacement[random] = self.ordinary_ids[rng.integers(len(self.ordinary_ids), size=int(random.sum()))]
        input_ids[positions] = replacement
        return MaskedRow(input_ids, [len(chunk.tokens) + 2 for chunk in row], positions, targets)

    def empty_row(self) -> MaskedRow:
        """A row of an empty document, with nothing to predict."""
        nothing = np.empty(0, dtype=np.int64)
        return MaskedRow(np.array([self.roles.cls, self.roles.sep]), [SPECIALS], nothing, nothing)

    def _wrap(self, row: Row) -> tuple[Integer[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
        """Token ids of the row, and which of them are text."""
        cls, sep = np.array([self.roles.cls]), np.array([self.roles.sep])
        input_ids = np.concatenate([part for chunk in row for part in (cls, chunk.tokens, sep)]).astype(np.int64)
        ends = np.cumsum([len(chunk.tokens) + 2 for chunk in row])
        text = np.ones(len(input_ids), dtype=bool)
        text[ends - 1] = False
        text[0] = False
        text[ends[:-1]] = False
        return input_ids, text


def collate(rows: list[MaskedRow], first_row: int) -> MicroBatch:
    """Lay rows end to end."""
    starts = np.cumsum([0, *(len(row.input_ids) for row in rows)])
    lengths = [length for row in rows for length in row.lengths]
    positions = [row.target_positions + start for row, start in zip(rows, starts, strict=False)]
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate([row.input_ids for row in rows])),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        max_seqlen=max(lengths),
        target_positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate([row.targets for row in rows])),
        first_row=first_row,
    )
