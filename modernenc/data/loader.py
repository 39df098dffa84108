"""One item of the loader is one optimizer step: its micro-batches, and the state of the data path after it.

1. The curriculum says which rows a step takes: row g of a phase comes from lane g mod L. For a task it says which items.
2. Rank r of W owns the lanes l with l mod W = r. It takes its rows in order and masks each by (seed, phase, row).
3. The rows are grouped into micro-batches; the states of the lanes after the step go with them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from modernenc.config import Run
from modernenc.curriculum import CAUSAL_LM, OF_TEXT, Curriculum, StepSpec, items_per_micro_batch, reads_text
from modernenc.data.batch import MicroBatch
from modernenc.data.blocks import Corpus
from modernenc.data.choices import Choices
from modernenc.data.lanes import Lane, LaneState, Mix, Row
from modernenc.data.masking import Masker
from modernenc.data.next_token import next_token_batch
from modernenc.data.state import DataState, TokenCounts
from modernenc.hashing import hash_file


@dataclass
class Step:
    """The work of one rank in one optimizer step."""

    micro_batches: list[MicroBatch]
    targets: int
    """Number of predicted tokens, or of items, in this rank's rows."""
    tokens: int
    """Number of tokens in this rank's rows, without padding."""
    state: dict[str, Any]
    """The `DataState` after the step, as plain values."""

    def pin_memory(self) -> "Step":
        """Return a copy in pinned memory, from which a GPU copies while it computes."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


class Steps:
    """The steps of one rank, in order, from a state to the end of the curriculum."""

    def __init__(self, run: Run, curriculum: Curriculum, corpus: Corpus, rank: int, world_size: int, state: DataState) -> None:
        self.run = run
        self.curriculum = curriculum
        self.corpus = corpus
        self.rank = rank
        self.world_size = world_size
        self.state = state
        self.mixes = open_mixes(run, corpus)
        self.tasks = {name: Choices(name, task, corpus, run.seed) for name, task in run.tasks.items()}

    def __iter__(self) -> Iterator[Step]:
        """Yield the steps; each iteration starts again from the state that was given."""
        state = DataState.from_dict(self.state.to_dict())
        if self.rank:  # the counts of a saved state are sums over all ranks, and only rank 0 continues them
            state.token_counts = {phase: TokenCounts() for phase in state.token_counts}
        lanes = self._restore_lanes(state)
        for spec in self.curriculum.steps(state.tokens_seen):
            counts = state.token_counts.setdefault(spec.phase, TokenCounts())
            if spec.objective in OF_TEXT:
                lanes = self._enter_phase(spec.phase, state, lanes)
                micro_batches = self._text_batches(spec, lanes, counts)
            else:
                micro_batches = self._task_batches(spec, counts)
            state.tokens_seen += spec.step_tokens
            state.lanes = {number: lane.state() for number, lane in lanes.items()}
            yield Step(
                micro_batches=micro_batches,
                targets=sum(len(batch.targets) for batch in micro_batches),
                # A micro-batch without targets is there to keep the ranks in step; its tokens are no text.
                tokens=sum(batch.num_tokens for batch in micro_batches if len(batch.targets)),
                state=state.to_dict(),
            )

    def check(self) -> None:
        """Rebuild the open buffers of the state; raises ValueError when one does not come out identical."""
        self._restore_lanes(self.state)

    def skip(self, tokens: int) -> DataState:
        """Return the state after skipping the next rows, as many as `tokens` of row capacity take.

        Requires `world_size == 1`, since all lanes move on. Raises ValueError in a phase that reads no text.
        """
        assert self.world_size == 1
        state = DataState.from_dict(self.state.to_dict())
        spec = self.curriculum.at(state.tokens_seen)
        if not reads_text(self.run.phases[spec.phase]):
            raise ValueError(f"--skip-tokens {tokens}: phases.{spec.phase}, where the checkpoint is, reads no text")
        lanes = self._enter_phase(spec.phase, state, self._restore_lanes(state))
        counts = state.token_counts.setdefault(spec.phase, TokenCounts())
        rows = -(-tokens // spec.seq_len)
        for row in range(spec.first_row, spec.first_row + rows):
            counts.skipped += sum(len(chunk.tokens) for chunk in self._next_row(lanes, row, counts))
        state.lanes = {number: lane.state() for number, lane in lanes.items()}
        return state

    def _restore_lanes(self, state: DataState) -> dict[int, Lane]:
        """Return this rank's lanes, at the positions that the state gives."""
        own = {lane: saved for lane, saved in state.lanes.items() if lane % self.world_size == self.rank}
        return {lane: self._lane(lane, state.phase, LaneState(**saved)) for lane, saved in own.items()}

    def _enter_phase(self, phase: str, state: DataState, lanes: dict[int, Lane]) -> dict[int, Lane]:
        """Return the given lanes, or lanes for a new phase where `phase` begins.

        A lane of a new phase continues its pass over each slice after the last block that the same lane drew; the rows left in
        its old buffer, which have another length, are dropped.
        """
        if phase == state.phase:
            return lanes
        state.phase = phase
        entered = {}
        for lane in range(self.rank, self.run.data.lanes, self.world_size):
            blocks = lanes[lane].blocks_drawn() if lanes else {}
            entered[lane] = self._lane(lane, phase, LaneState(blocks=blocks, tokens=self.mixes[phase].initial_offset(lane)))
        return entered

    def _lane(self, lane: int, phase: str, state: LaneState) -> Lane:
        data, seq_len = self.run.data, self.run.phases[phase].seq_len
        seed = (self.run.seed, list(self.run.phases).index(phase))
        return Lane(lane, data.lanes, self.mixes[phase], seq_len, data.buffer_rows, seed, state)

    def _next_row(self, lanes: dict[int, Lane], number: int, counts: TokenCounts) -> Row:
        """Take row `number` of the phase from its lane, and count what the lane drew for it."""
        lane = lanes[number % self.run.data.lanes]
        row = lane.next_row()
        counts.add_draws(lane)
        return row

    def _text_batches(self, spec: StepSpec, lanes: dict[int, Lane], counts: TokenCounts) -> list[MicroBatch]:
        """Return the micro-batches of a step that reads text."""
        masker = Masker(self.corpus.roles, self.corpus.ordinary_ids, spec.mask_ratio)

        def batch(rows: list[Row], seeds: list[tuple[int, ...]], first_row: int) -> MicroBatch:
            if spec.objective == CAUSAL_LM:
                return next_token_batch(rows, self.corpus.roles, first_row)
            return masker.batch(rows, seeds, first_row)

        phase = list(self.run.phases).index(spec.phase)
        all_rows = range(spec.first_row, spec.first_row + spec.batch_rows)
        numbers = [row for row in all_rows if row % self.run.data.lanes in lanes]
        rows = [self._next_row(lanes, number, counts) for number in numbers]
        for row in rows:
            counts.add_row(row, spec.seq_len)
        seeds = [(self.run.seed, phase, number) for number in numbers]
        size = max(1, self.run.trainer.micro_batch_tokens // spec.seq_len)
        micro_batches = [batch(rows[at : at + size], seeds[at : at + size], numbers[at]) for at in range(0, len(rows), size)]
        # All ranks run the same number of micro-batches, even where one has a row less: the collectives of a forward pass
        # (FSDP2 gathers weights in it) must pair up.
        ranks = np.array(all_rows) % self.run.data.lanes % self.world_size
        most_rows = int(np.bincount(ranks).max())
        idle = -(-most_rows // size) - len(micro_batches)
        return micro_batches + [batch([], [], 0)] * idle

    def _task_batches(self, spec: StepSpec, counts: TokenCounts) -> list[MicroBatch]:
        """Return the micro-batches of a step that trains a task."""
        task, source = self.run.tasks[spec.objective], self.tasks[spec.objective]
        all_items = range(spec.first_item, spec.first_item + task.batch_items)
        numbers = [number for number in all_items if number % self.world_size == self.rank]
        drawn = [source.draw(number) for number in numbers]
        items = [source.encode(item) for item in drawn]
        for item in items:
            for choice in item:
                counts.add_choice(spec.objective, choice, task.seq_len)
        labels = [item.label for item in drawn]
        size = items_per_micro_batch(task, self.run.trainer.micro_batch_tokens)
        most_items = -(-task.batch_items // self.world_size)
        return [
            source.collate(items[at : at + size], labels[at : at + size], numbers[at] if at < len(numbers) else 0)
            for at in range(0, most_items, size)
        ]


def open_mixes(run: Run, corpus: Corpus) -> dict[str, Mix]:
    """Open the mix of each phase that reads text.

    Raises FileNotFoundError or ValueError, naming the shard, when a local shard is missing or has another size.
    """
    return {name: Mix(corpus, phase.mix, run.data.lanes, run.seed) for name, phase in run.phases.items() if reads_text(phase)}


def fingerprint(run: Run, corpus: Corpus) -> dict[str, Any]:
    """Return hashes of all data that the run reads; they change with any token, and with the file of any task."""
    tasks = {name: hash_file(Path(task.train)) for name, task in run.tasks.items()}
    return {"corpus": corpus.fingerprint(phase.mix for phase in run.phases.values()), "tasks": tasks}
