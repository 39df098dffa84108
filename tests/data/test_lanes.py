"""Lanes: every block once a pass, declared proportions, exact state."""

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Block, Corpus, Shards
from modernenc.data.lanes import BlockOrder, Lane, LaneState, Mix
from modernenc.data.loader import Steps
from modernenc.data.state import DataState, merge_rank_states
from modernenc.data.store import Store
from modernenc.planning.checks import check_run


@pytest.mark.parametrize(
    ("sizes", "lanes"), [([5, 3, 7], 4), ([1] * 30, 7), ([40], 40), ([13, 1, 1, 29, 8, 8, 8, 8, 8, 8, 9], 6)]
)
def test_each_pass_serves_each_block_once(sizes, lanes):
    order = BlockOrder(sizes, lanes, seed=1, name="a/slice-000")
    blocks = sum(sizes)
    everything = {(shard, index) for shard, size in enumerate(sizes) for index in range(size)}
    spans = [blocks * (span + 1) // lanes - blocks * span // lanes for span in range(lanes)]
    assert max(spans) - min(spans) <= 1
    drawn = [0] * lanes
    for turn in range(lanes + 1):
        seen = []
        for lane in range(lanes):
            for _ in range(spans[(lane + turn) % lanes]):
                seen.append(order.block_at(lane, drawn[lane]))
                drawn[lane] += 1
        assert len(seen) == blocks
        assert set(seen) == everything


def passes_of(sizes: list[int], seed: int = 1, name: str = "a/slice-000") -> list[list[tuple[int, int]]]:
    """The first passes of a lane that is alone, and so walks all blocks in each."""
    order, blocks = BlockOrder(sizes, 1, seed, name), sum(sizes)
    return [[order.block_at(0, turn * blocks + at) for at in range(blocks)] for turn in range(3)]


def test_the_order_depends_on_the_pass_the_seed_and_the_slice_alone():
    passes = passes_of([50, 53])
    assert passes == passes_of([50, 53])
    orders = [*passes, passes_of([50, 53], seed=2)[0], passes_of([50, 53], name="b/slice-000")[0]]
    assert all(one != other for one, other in combinations(orders, 2))
    assert all(sorted(order) == sorted(passes[0]) for order in orders)


def test_blocks_are_shuffled_among_eight_shards_at_a_time():
    for order in passes_of([20] * 24):
        groups = [{shard for shard, _ in order[at : at + 160]} for at in range(0, 480, 160)]
        assert [len(group) for group in groups] == [8, 8, 8] and len(set.union(*groups)) == 24
        assert len({shard for shard, _ in order[:20]}) > 4


def lanes_of(corpus_root, lanes=4, mix=None, buffer_rows=8, seq_len=64):
    corpus = Corpus(Store(str(corpus_root)))
    shares = Mix(corpus, mix or {"code": 3, "docstrings": 2, "reference": 1}, lanes, seed=1)
    states = [LaneState(tokens=shares.initial_offset(lane)) for lane in range(lanes)]
    return [Lane(n, lanes, shares, seq_len, buffer_rows, (1, 0), state) for n, state in enumerate(states)], shares


def test_lanes_serve_the_declared_proportions(corpus_root):
    lanes, shares = lanes_of(corpus_root)
    for _ in range(200):
        for lane in lanes:
            lane.next_row()
    block = shares.block_tokens
    for lane in lanes:
        drawn = lane.drawn
        total = sum(drawn.values())
        for name, source in shares.slices.items():
            # One block for the end of the window, one for the head start.
            assert abs(drawn[name] - source.proportion * total) <= 2 * block
    together = Counter()
    for lane in lanes:
        together.update(lane.drawn)
    for name, source in shares.slices.items():
        assert abs(together[name] - source.proportion * together.total()) <= len(lanes) * block


def test_lanes_begin_apart_in_the_sequence_of_sources(corpus_root):
    lanes, shares = lanes_of(corpus_root, lanes=24, mix={"code": 3, "docstrings": 2, "reference": 1}, buffer_rows=1)
    first = Counter(shares.largest_deficit(shares.initial_offset(number)) for number in range(len(lanes)))
    assert first == {"code/slice-000": 12, "docstrings/slice-000": 8, "reference/slice-000": 4}


@pytest.mark.parametrize("served", [0, 1, 5, 23, 24, 25, 60])
def test_a_lane_continues_from_its_state(corpus_root, served):
    (lane, *_), shares = lanes_of(corpus_root)
    for _ in range(served):
        lane.next_row()
    state = LaneState(**lane.state())
    again = Lane(0, 4, shares, 64, 8, (1, 0), state)
    for _ in range(60):
        ours, theirs = lane.next_row(), again.next_row()
        assert len(ours) == len(theirs)
        assert all(np.array_equal(a.tokens, b.tokens) and a.slice == b.slice for a, b in zip(ours, theirs, strict=True))


def test_a_row_holds_what_fits_and_a_lane_counts_what_it_drew(corpus_root):
    lanes, mix = lanes_of(corpus_root, seq_len=1000)
    for lane in lanes:
        rows = [lane.next_row() for _ in range(30)]
        assert max(sum(len(chunk.tokens) + 2 for chunk in row) for row in rows) <= 1000
        assert max(len(row) for row in rows) > 2
        for name, blocks in lane.blocks_drawn().items():
            source = mix.slices[name]
            read = [source.shards.read(*source.order.block_at(lane.lane, number)) for number in range(blocks)]
            assert lane.drawn[name] == sum(len(block.tokens) for block in read)


def test_the_next_phase_continues_after_the_blocks_of_the_open_buffer(corpus_root):
    (lane, *_), mix = lanes_of(corpus_root)
    lane.next_row()
    assert lane.blocks_drawn() != lane.state()["blocks"]
    drawn = lane.blocks_drawn()
    following = Lane(0, 4, mix, 64, 8, (1, 1), LaneState(blocks=drawn))
    assert following.blocks_drawn() == drawn
    served = {tuple(chunk.tokens.tolist()) for _ in range(6) for chunk in following.next_row() if len(chunk.tokens) > 20}
    again = Lane(0, 4, mix, 64, 8, (1, 1), LaneState())
    assert served and not served & {tuple(chunk.tokens.tolist()) for _ in range(2) for chunk in again.next_row()}


class Recorded:
    """Shards that note which of them were fetched ahead, and refuse to read another."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.ahead: set[int] = set()

    def prefetch(self, shard: int) -> None:
        self.ahead.add(shard)

    def read(self, shard: int, index: int) -> Block:
        assert shard in self.ahead, f"shard {shard} was not fetched ahead"
        return self.shards.read(shard, index)


def test_every_shard_is_prefetched_before_its_first_block_is_read(corpus_root):
    lanes, mix = lanes_of(corpus_root)
    recorded: dict[str, Any] = {name: Recorded(source.shards) for name, source in mix.slices.items()}
    mix.slices = {name: source._replace(shards=recorded[name]) for name, source in mix.slices.items()}
    for lane in lanes:
        for _ in range(60):
            lane.next_row()
    assert all(len(shards.ahead) > 1 for shards in recorded.values())


def test_a_buffer_that_cannot_be_rebuilt_identically_is_an_error(corpus_root):
    (lane, *_), shares = lanes_of(corpus_root)
    lane.next_row()
    state = LaneState(**{**lane.state(), "checksum": "0" * 16})
    with pytest.raises(ValueError, match="lane 0: the packing buffer that was open at the checkpoint"):
        Lane(0, 4, shares, 64, 8, (1, 0), state)


def test_buffers_are_refilled_at_different_times(corpus_root):
    lanes, _ = lanes_of(corpus_root, buffer_rows=40)
    rows_of_first_window = []
    for lane in lanes:
        count = 0
        while lane.state()["buffer"] == 0:
            lane.next_row()
            count += 1
        rows_of_first_window.append(count)
    assert rows_of_first_window == sorted(rows_of_first_window)
    assert len(set(rows_of_first_window)) == len(lanes)


def steps_of(run, state=None, rank=0, world_size=1):
    curriculum, corpus = check_run(run)
    return Steps(run, curriculum, corpus, rank, world_size, DataState.from_dict(state) if state else DataState())


def contents(step):
    """What each micro-batch holds; one without targets only keeps ranks in step."""
    return [
        (batch.input_ids.tolist(), batch.cu_seqlens.tolist(), batch.targets.tolist())
        for batch in (padded.unpadded() for padded in step.micro_batches)
        if len(batch.targets)
    ]


def test_every_token_drawn_is_served_or_in_an_open_buffer(small_run):
    run = small_run()
    steps = list(steps_of(run))
    accounts = steps[-1].state["token_counts"]
    curriculum = Curriculum(run.phases)
    assert list(accounts) == list(run.phases)
    text = special = padding = 0
    for name, account in accounts.items():
        capacity = curriculum.end_of(name) - curriculum.start_of(name)
        served = sum(account["served"].values())
        assert served + account["special"] + account["padding"] == capacity
        unserved = sum(account["drawn"].values()) - served
        assert 0 <= unserved <= run.data.lanes * (run.data.buffer_rows * run.phases[name].seq_len + 256)
        text, special, padding = text + served, special + account["special"], padding + account["padding"]
    assert text + special == sum(step.tokens for step in steps)
    assert padding / (text + special + padding) < 0.2  # windows of 8 rows; see the test of windows of 512


def test_steps_continue_from_any_state(small_run):
    run = small_run()
    everything = list(steps_of(run))
    for at in range(0, len(everything) - 1, 4):
        rest = list(steps_of(run, everything[at].state))
        assert [contents(step) for step in rest] == [contents(step) for step in everything[at + 1 :]]
        assert rest[-1].state == everything[-1].state


def test_micro_batches_do_not_change_what_a_step_sees(small_run):
    whole = list(steps_of(small_run("trainer.micro_batch_tokens=100000")))
    parts = list(steps_of(small_run("trainer.micro_batch_tokens=1")))
    assert len(parts[12].micro_batches) > len(whole[12].micro_batches) == 1
    for one, other in zip(whole, parts, strict=True):
        assert [i for b in one.micro_batches for i in b.unpadded().input_ids.tolist()] == [
            i for b in other.micro_batches for i in b.unpadded().input_ids.tolist()
        ]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_see_what_one_rank_sees(small_run, world_size):
    run = small_run("trainer.micro_batch_tokens=1", "phases.stable.ramp.tokens=0", "phases.stable.batch_rows=5")
    alone = steps_of(run)
    together = zip(*(steps_of(run, rank=rank, world_size=world_size) for rank in range(world_size)), strict=True)
    for one, many in zip(alone, together, strict=True):
        rows = sorted(contents(one))
        assert rows == sorted(row for step in many for row in contents(step))
        assert len({len(step.micro_batches) for step in many}) == 1  # FSDP2 gathers weights in each forward pass
        assert sum(step.tokens for step in many) == one.tokens


@pytest.mark.parametrize("world_size", [6, 7])
def test_numbers_of_ranks_that_divide_neither_lanes_nor_rows_see_the_same_text(small_run, world_size):
    rows = [f"phases.{phase}.batch_rows=20" for phase in ("stable", "extend", "decay")]
    run = small_run("data.lanes=10", "phases.stable.ramp.tokens=0", "trainer.micro_batch_tokens=128", *rows)
    alone = steps_of(small_run("data.lanes=10", "phases.stable.ramp.tokens=0", "trainer.micro_batch_tokens=1", *rows))
    together = zip(*(steps_of(run, rank=rank, world_size=world_size) for rank in range(world_size)), strict=True)
    for one, many in zip(alone, together, strict=True):
        busy = [batch for step in many for batch in step.micro_batches if len(batch.targets)]
        documents = Counter(tuple(ids) for batch in busy for ids in split(batch))
        assert documents == Counter(tuple(ids) for batch in one.micro_batches for ids in split(batch))
        assert len({len(step.micro_batches) for step in many}) == 1


def split(batch):
    """The documents of a micro-batch."""
    batch = batch.unpadded()
    return [ids.tolist() for ids in batch.input_ids.split(batch.cu_seqlens.diff().tolist())]


def test_any_number_of_ranks_continues_from_the_same_state(small_run):
    run = small_run("trainer.micro_batch_tokens=1", "phases.stable.ramp.tokens=0", "phases.stable.batch_rows=5")
    alone = list(steps_of(run))
    state, done = None, 0
    for world_size, steps in ((2, 9), (3, 11), (1, 1), (4, None)):
        ranks = [list(steps_of(run, state, rank, world_size)) for rank in range(world_size)]
        for number, together in enumerate(list(zip(*ranks, strict=True))[:steps]):
            assert sorted(contents(alone[done + number])) == sorted(row for step in together for row in contents(step))
        last = (steps or len(ranks[0])) - 1
        state = merge_rank_states([DataState.from_dict(rank[last].state) for rank in ranks]).to_dict()
        assert state["token_counts"] == alone[done + last].state["token_counts"]
        assert dict(sorted(state["lanes"].items())) == alone[done + last].state["lanes"]
        done += last + 1
    assert done == len(alone)


def test_each_optimizer_step_sees_other_text(small_run):
    seen = Counter()
    for step in steps_of(small_run()):
        for batch in step.micro_batches:
            seen[tuple(batch.input_ids[:40].tolist())] += 1
    assert max(seen.values()) == 1
