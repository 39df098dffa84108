"""Lanes are the unit of order: a lane draws blocks by the mix, packs a buffer of them, and serves its rows.

1. `BlockOrder.block_at` orders the blocks of one slice; it is a pure function of (seed, slice, lane, blocks drawn).
2. A `Lane` draws blocks from the slice with the largest token deficit until its packing buffer is full, then cuts and packs
   them, and shuffles the rows.
3. Its state says where the open buffer began and how many of its rows were served, so resuming fills one buffer again.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import xxhash
from jaxtyping import Integer

from modernenc.data.blocks import Corpus, Shards
from modernenc.data.packing import SPECIALS, cut, pack

SHUFFLE_SHARDS = 8
"""Number of shards whose blocks are shuffled together. A node has about that many open per lane and slice."""


class Chunk(NamedTuple):
    """A document, or a part of one, and the slice that it comes from."""

    tokens: Integer[np.ndarray, " tokens"]
    slice: str


Row = list[Chunk]


def seed_of(name: str) -> int:
    """Turn a name into an integer for a seed sequence; unlike `hash`, it is the same in every process."""
    return zlib.crc32(name.encode())


class BlockOrder:
    """The order in which the lanes read the blocks of one slice, pass after pass.

    A pass is a seeded permutation of the shards, then of the blocks within groups of `SHUFFLE_SHARDS` shards. It is cut
    into one contiguous span per lane; spans differ by at most one block. In pass p lane l reads span (l + p) mod lanes, so
    each pass contains each block once.
    """

    def __init__(self, sizes: list[int], lanes: int, seed: int, name: str) -> None:
        self.sizes = np.asarray(sizes)
        self.blocks = int(self.sizes.sum())
        self.lanes = lanes
        self.seed = (seed, seed_of(name))
        self._arguments = (sizes, lanes, seed, name)
        # Small caches suffice: a lane fills its whole buffer from few groups before the next lane draws.
        self._shards = lru_cache(4)(self._permute_shards)
        self._group = lru_cache(16)(self._permute_group)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments alone: another process builds its own caches."""
        return BlockOrder, self._arguments

    def block_at(self, lane: int, drawn: int) -> tuple[int, int]:
        """Return shard and index of the block that `lane` takes after it has drawn `drawn` blocks of this slice."""
        # The spans of successive passes, laid end to end, form one line. A lane starts at the beginning of its own span and
        # goes on: at the end of the span it enters the next span of the next pass.
        place = self.blocks * lane // self.lanes + drawn
        span = (self.lanes * (place + 1) - 1) // self.blocks
        epoch, position = span - lane, place % self.blocks
        _, ends = self._shards(epoch)
        # Only the group that holds the position is permuted: a pass may have millions of blocks.
        group = int(np.searchsorted(ends[SHUFFLE_SHARDS - 1 :: SHUFFLE_SHARDS], position, side="right"))
        first = 0 if group == 0 else int(ends[group * SHUFFLE_SHARDS - 1])
        shard, index = self._group(epoch, group)[position - first].tolist()
        return shard, index

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the order of a pass, and the number of blocks up to the end of each."""
        shards = np.random.default_rng([*self.seed, epoch]).permutation(len(self.sizes))
        return shards, self.sizes[shards].cumsum()

    def _permute_group(self, epoch: int, group: int) -> np.ndarray:
        """Return shard and index of each block of a group of shards, in the order of a pass."""
        members = self._shards(epoch)[0][group * SHUFFLE_SHARDS : (group + 1) * SHUFFLE_SHARDS]
        sizes = self.sizes[members]
        blocks = np.stack([members.repeat(sizes), np.concatenate([np.arange(size) for size in sizes])], 1)
        return np.random.default_rng([*self.seed, epoch, group]).permutation(blocks)


class MixedSlice(NamedTuple):
    """One slice of the corpus as part of a mix."""

    shards: Shards
    order: BlockOrder
    proportion: float
    """Fraction of the tokens that this slice supplies; the fractions of a mix sum to 1."""


class Mix:
    """The slices of a phase with their proportions.

    Opening a mix checks that every shard of every slice exists and has its size; see `Corpus.open` for the errors.
    """

    def __init__(self, corpus: Corpus, mix: dict[str, float], lanes: int, seed: int) -> None:
        self.slices: dict[str, MixedSlice] = {}
        self.block_tokens = corpus.block_tokens
        for name, proportion in corpus.slices(mix).items():
            shards = corpus.open(name)
            assert len(shards) >= lanes, "checks.check_run refuses a slice with fewer blocks than lanes"
            self.slices[name] = MixedSlice(shards, BlockOrder(shards.sizes, lanes, seed, name), proportion)

    def largest_deficit(self, tokens: Mapping[str, int]) -> str:
        """Return the slice that is furthest behind its proportion, given the tokens drawn from each slice so far."""
        # The total counts the block to be drawn now, which makes the largest slice the first one.
        total = sum(tokens.values()) + self.block_tokens
        return max(self.slices, key=lambda name: self.slices[name].proportion * total - tokens.get(name, 0))

    def initial_offset(self, lane: int) -> dict[str, int]:
        """Return the token counts with which a lane starts a phase: as if it had drawn `lane` blocks already.

        Lanes thus start one block apart in the same sequence of slices, and the proportions hold across lanes at any moment,
        not only for each lane over time.
        """
        tokens = Counter[str]()
        for _ in range(lane):
            tokens[self.largest_deficit(tokens)] += self.block_tokens
        return dict(tokens)


@dataclass
class LaneState:
    """The position of a lane: enough to rebuild its open packing buffer and to continue."""

    buffer: int = 0
    """Number of buffers used up in this phase before the open one."""
    row: int = 0
    """Number of rows of the open buffer that were served."""
    blocks: dict[str, int] = field(default_factory=dict)
    """Blocks drawn from each slice since the run started, without those of the open buffer."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens drawn from each slice in this phase, including the initial offset, without those of the open buffer."""
    checksum: str = ""
    """Hash of the open buffer's rows; empty when no buffer is open."""


class Lane:
    """One lane in one phase.

    `drawn` counts the tokens that were drawn from each slice in this process, and `cuts` the document ends that packing added;
    the caller may reset both. `seed` is (seed of the run, number of the phase).

    Raises ValueError when the open buffer of `state` cannot be rebuilt identically, because code or data have changed.
    """

    def __init__(
        self, lane: int, lanes: int, mix: Mix, seq_len: int, buffer_rows: int, seed: tuple[int, int], state: LaneState
    ) -> None:
        self.lane = lane
        self.lanes = lanes
        self.mix = mix
        self.seq_len = seq_len
        self.buffer_rows = buffer_rows
        self.seed = seed
        self.drawn = Counter[str]()
        self.cuts = 0
        self._state = state
        self._rows: list[Row] = []
        # Blocks and tokens drawn up to the end of the open buffer; `_state` has those up to its beginning.
        self._blocks, self._tokens = Counter(state.blocks), Counter(state.tokens)
        if state.checksum:
            self._fill_buffer()
            self.drawn, self.cuts = Counter(), 0  # they were counted when the buffer was first filled
            if _checksum(self._rows) != state.checksum:
                raise ValueError(
                    f"lane {lane}: the packing buffer that was open at the checkpoint cannot be rebuilt identically; "
                    "the data or the packing code changed since, so the run cannot go on exactly"
                )

    def next_row(self) -> Row:
        """Return the next row, and fill the buffer again when all its rows were served."""
        state = self._state
        if state.row == len(self._rows):
            if self._rows:
                state.buffer += 1
                state.blocks, state.tokens = dict(self._blocks), dict(self._tokens)
            self._fill_buffer()
            state.row = 0
            state.checksum = _checksum(self._rows)
        state.row += 1
        return self._rows[state.row - 1]

    def state(self) -> dict[str, Any]:
        """Return the lane's state as plain values."""
        return {**vars(self._state), "blocks": dict(self._state.blocks), "tokens": dict(self._state.tokens)}

    def blocks_drawn(self) -> dict[str, int]:
        """Return the blocks drawn from each slice since the run started; the next phase continues after them.

        Those of the open buffer are included, because its remaining rows are dropped when the phase ends.
        """
        return dict(self._blocks)

    def _fill_buffer(self) -> None:
        # A remote shard takes seconds to fetch, so the downloads begin one buffer ahead.
        self._prefetch(2 * self.buffer_rows * self.seq_len)
        chunks = list(self._draw())
        rows = pack([len(chunk.tokens) + SPECIALS for chunk in chunks], self.seq_len)
        # Packing sorts by length: without the shuffle, whole steps would have only long or only short documents.
        order = np.random.default_rng([*self.seed, self.lane, self._state.buffer]).permutation(len(rows))
        self._rows = [[chunks[item] for item in rows[row]] for row in order.tolist()]

    def _draw(self) -> Iterator[Chunk]:
        """Draw blocks until the buffer is full, and yield their chunks."""
        wanted = self.buffer_rows * self.seq_len
        if self._state.buffer == 0:
            # The lanes' first buffers have 1/L, 2/L, ... of the size, so that their refills are spread over the steps.
            wanted = -(-wanted * (self.lane + 1) // self.lanes)
        while wanted > 0:
            name = self.mix.largest_deficit(self._tokens)
            source = self.mix.slices[name]
            block = source.shards.read(*source.order.block_at(self.lane, self._blocks[name]))
            self._blocks[name] += 1
            for counts in (self._tokens, self.drawn):
                counts[name] += len(block.tokens)
            chunks = cut(block, self.seq_len)
            self.cuts += len(chunks) - len(block.ends) + block.continues
            wanted -= len(block.tokens) + SPECIALS * len(chunks)
            yield from (Chunk(tokens, name) for tokens in chunks)

    def _prefetch(self, capacity: int) -> None:
        """Start to download the shards of the next `capacity` tokens; this does nothing for a local corpus."""
        blocks, tokens = self._blocks.copy(), self._tokens.copy()
        for _ in range(-(-capacity // self.mix.block_tokens)):
            name = self.mix.largest_deficit(tokens)
            source = self.mix.slices[name]
            source.shards.prefetch(source.order.block_at(self.lane, blocks[name])[0])
            blocks[name] += 1
            tokens[name] += self.mix.block_tokens


def _checksum(rows: list[Row]) -> str:
    digest = xxhash.xxh3_64()
    for row in rows:
        digest.update(np.asarray([len(chunk.tokens) for chunk in row]).tobytes())
        for chunk in row:
            digest.update(chunk.tokens.tobytes())
    return digest.hexdigest()
