"""Lanes: the unit of order. A lane draws blocks by the mix, packs a window of them, and serves its rows.

1. `block_at` orders one slice: pure in (seed, slice, lane, blocks drawn).
2. `Lane` draws from the slice with the largest token deficit until a window is full, cuts, packs, shuffles the rows.
3. Its state is where the open window began and how many of its rows were served, so that resuming reads one window again.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import xxhash
from jaxtyping import Integer

from modernenc.data.blocks import Corpus, Shards
from modernenc.data.packing import SPECIALS, cut, pack

SHUFFLE_SHARDS = 8
"""Shards whose blocks are shuffled together; a node holds about that many open per lane and slice."""


class Chunk(NamedTuple):
    """A document, or a stretch of one, with its place in the mix."""

    tokens: Integer[np.ndarray, " tokens"]
    slice: str


Row = list[Chunk]


def seed_of(name: str) -> int:
    """A number that stands for a name in a seed sequence, the same in every process."""
    return zlib.crc32(name.encode())


class BlockOrder:
    """The order in which lanes walk the blocks of one slice, pass after pass.

    A pass is a seeded permutation of the shards, then of the blocks within groups of shards, cut into one contiguous span per
    lane, of sizes that differ by at most one. In pass p lane l walks span (l + p) mod lanes, so that in each pass each block
    comes once.
    """

    def __init__(self, sizes: list[int], lanes: int, seed: int, name: str) -> None:
        self.sizes = np.asarray(sizes)
        self.blocks = int(self.sizes.sum())
        self.lanes = lanes
        self.seed = (seed, seed_of(name))
        self._arguments = (sizes, lanes, seed, name)
        self._shards = lru_cache(4)(self._shard_order)
        self._group = lru_cache(16)(self._group_order)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process makes it anew: what is remembered here stays."""
        return BlockOrder, self._arguments

    def block_at(self, lane: int, drawn: int) -> tuple[int, int]:
        """Shard and index of the block that `lane` takes after `drawn` blocks of this slice."""
        # Laid end to end, the spans of successive passes are one line on which the lane walks on from its own span's start.
        position = self._span_start(lane) + drawn
        span = (self.lanes * (position + 1) - 1) // self.blocks
        return self._permuted(span - lane, position % self.blocks)

    def _span_start(self, span: int) -> int:
        return self.blocks * span // self.lanes

    def _permuted(self, turn: int, position: int) -> tuple[int, int]:
        _, ends = self._shards(turn)
        group = int(np.searchsorted(ends[SHUFFLE_SHARDS - 1 :: SHUFFLE_SHARDS], position, side="right"))
        first = 0 if group == 0 else int(ends[group * SHUFFLE_SHARDS - 1])
        shard, index = self._group(turn, group)[position - first].tolist()
        return shard, index

    def _shard_order(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        shards = np.random.default_rng([*self.seed, turn]).permutation(len(self.sizes))
        return shards, self.sizes[shards].cumsum()

    def _group_order(self, turn: int, group: int) -> np.ndarray:
        shards, _ = self._shards(turn)
        members = shards[group * SHUFFLE_SHARDS : (group + 1) * SHUFFLE_SHARDS]
        blocks = np.concatenate(
            [np.stack([np.full(n, s), np.arange(n)], 1) for s, n in zip(members, self.sizes[members], strict=True)]
        )
        return np.random.default_rng([*self.seed, turn, group]).permutation(blocks)


class Source(NamedTuple):
    """A slice under the mix of a phase."""

    shards: Shards
    order: BlockOrder
    share: float


class Mix:
    """The slices of a phase and the share of tokens that each is owed; every shard is there and has its size."""

    def __init__(self, corpus: Corpus, mix: dict[str, float], lanes: int, seed: int) -> None:
        self.sources: dict[str, Source] = {}
        self.block_tokens = corpus.block_tokens
        for name, share in corpus.slices(mix).items():
            shards = corpus.open(name)
            assert len(shards) >= lanes, "checks.check_run refuses a slice with fewer blocks than lanes"
            self.sources[name] = Source(shards, BlockOrder(shards.sizes, lanes, seed, name), share)

    def most_owed(self, tokens: dict[str, int]) -> str:
        """The slice whose share lags the most, given the tokens drawn of each."""
        total = sum(tokens.values()) + self.block_tokens
        return max(self.sources, key=lambda name: self.sources[name].share * total - tokens.get(name, 0))

    def head_start(self, lane: int) -> dict[str, int]:
        """Tokens as if `lane` blocks had been drawn: lanes begin one block apart in the same sequence of sources.

        So not only each lane over time but all lanes at any time hold the declared proportions.
        """
        tokens: dict[str, int] = {}
        for _ in range(lane):
            name = self.most_owed(tokens)
            tokens[name] = tokens.get(name, 0) + self.block_tokens
        return tokens


@dataclass
class LaneState:
    """Where a lane stands: enough to rebuild its open window and go on."""

    window: int = 0
    """Windows opened in this phase before the open one."""
    row: int = 0
    """Rows of the open window already served."""
    blocks: dict[str, int] = field(default_factory=dict)
    """Blocks drawn of each slice since the run started, before the open window."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens drawn of each slice in this phase, before the open window, head start included."""
    checksum: str = ""
    """Hash of the open window's rows; empty when none is open."""


class Lane:
    """One lane in one phase.

    `drawn` counts the tokens taken from each slice by windows opened in this process, and `cuts` the document ends that
    packing added, for the account of the run.
    Raises ValueError on restoring a window that no longer comes out as it did: code or data changed.
    """

    def __init__(
        self,
        lane: int,
        lanes: int,
        mix: Mix,
        seq_len: int,
        buffer_rows: int,
        seed: tuple[int, int],
        state: LaneState,
    ) -> None:
        self.lane = lane
        self.lanes = lanes
        self.mix = mix
        self.seq_len = seq_len
        self.buffer_rows = buffer_rows
        self.seed = seed
        self.drawn: dict[str, int] = {}
        self.cuts = 0
        self._state = state
        self._rows: list[Row] = []
        if state.checksum:
            self._resume()

    def next_row(self) -> Row:
        """Serve the next row, opening a window when the last one is used up."""
        if self._state.row == len(self._rows):
            if self._rows:
                self._state.window += 1
                self._state.blocks, self._state.tokens = self._blocks, self._tokens
            self._open()
            self._state.row = 0
            self._state.checksum = _checksum(self._rows)
        row = self._rows[self._state.row]
        self._state.row += 1
        return row

    def state(self) -> dict:
        """The lane's state as plain values."""
        return {**vars(self._state), "blocks": dict(self._state.blocks), "tokens": dict(self._state.tokens)}

    def blocks_drawn(self) -> dict[str, int]:
        """Blocks drawn of each slice since the run started, the open window's included: where the next phase goes on."""
        return dict(self._blocks) if self._rows else dict(self._state.blocks)

    def _resume(self) -> None:
        self._open()
        self.drawn, self.cuts = {}, 0  # counted when the window was first opened
        if _checksum(self._rows) != self._state.checksum:
            raise ValueError(
                f"lane {self.lane}: the window that was open at the checkpoint does not come out the same; "
                "the data or the packing code changed since, so the run cannot go on exactly"
            )

    def _open(self) -> None:
        self._blocks = dict(self._state.blocks)
        self._tokens = dict(self._state.tokens)
        self._prefetch(2 * self.buffer_rows * self.seq_len)
        chunks = list(self._draw())
        rows = pack([len(chunk.tokens) + SPECIALS for chunk in chunks], self.seq_len)
        order = np.random.default_rng([*self.seed, self.lane, self._state.window]).permutation(len(rows))
        self._rows = [[chunks[item] for item in rows[row]] for row in order.tolist()]

    def _draw(self) -> Iterator[Chunk]:
        """Chunks of a window's worth of blocks; the first window is a lane's share of one, so that refills are staggered."""
        wanted = self.buffer_rows * self.seq_len
        if self._state.window == 0:
            wanted = -(-wanted * (self.lane + 1) // self.lanes)
        while wanted > 0:
            name = self.mix.most_owed(self._tokens)
            source = self.mix.sources[name]
            drawn = self._blocks.get(name, 0)
            block = source.shards.read(*source.order.block_at(self.lane, drawn))
            self._blocks[name] = drawn + 1
            self._tokens[name] = self._tokens.get(name, 0) + len(block.tokens)
            self.drawn[name] = self.drawn.get(name, 0) + len(block.tokens)
            chunks = cut(block, self.seq_len)
            self.cuts += len(chunks) - len(block.ends) + block.continues
            wanted -= len(block.tokens) + SPECIALS * len(chunks)
            yield from (Chunk(tokens, name) for tokens in chunks)

    def _prefetch(self, capacity: int) -> None:
        """Have the shards of the next rows fetched, from where the lane stands; for remote ones only."""
        blocks, tokens = dict(self._blocks), dict(self._tokens)
        for _ in range(-(-capacity // self.mix.block_tokens)):
            name = self.mix.most_owed(tokens)
            source = self.mix.sources[name]
            source.shards.prefetch(source.order.block_at(self.lane, blocks.get(name, 0))[0])
            blocks[name] = blocks.get(name, 0) + 1
            tokens[name] = tokens.get(name, 0) + self.mix.block_tokens


def _checksum(rows: list[Row]) -> str:
    digest = xxhash.xxh3_64()
    for row in rows:
        digest.update(np.asarray([len(chunk.tokens) for chunk in row]).tobytes())
        for chunk in row:
            digest.update(chunk.tokens.tobytes())
    return digest.hexdigest()
