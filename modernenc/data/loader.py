"""One loader item = one optimizer step: its micro-batches and the state of the data after it.

1. The curriculum says which rows the step takes: row g of a phase comes from lane g mod L. Of a task it says which items.
2. Rank r of W serves the lanes l with l mod W = r, in order, and masks its rows by (seed, phase, row).
3. Rows are grouped into micro-batches; the lanes' state after the step travels with them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modernenc.config import Run
from modernenc.curriculum import MASKED_LM, Curriculum, Point, items_at_once, reads_text
from modernenc.data import choices
from modernenc.data.batch import MicroBatch
from modernenc.data.blocks import Corpus
from modernenc.data.lanes import Lane, LaneState, Mix, Row
from modernenc.data.masking import Masker
from modernenc.data.packing import SPECIALS


@dataclass
class PhaseAccount:
    """Where the tokens of one phase went, so far."""

    drawn: dict[str, int] = field(default_factory=dict)
    """Text tokens drawn from each slice into windows, or for a task."""
    served: dict[str, int] = field(default_factory=dict)
    """Text tokens of each slice or task that reached a step; the rest of `drawn` lies unserved in open windows."""
    skipped: int = 0
    """Text tokens of rows that a rollback passed by."""
    special: int = 0
    padding: int = 0
    cuts: int = 0
    """Document ends that are not ends, cuts to the row length and at block ends; and choices too long for a row."""

    def serve(self, row: Row, seq_len: int) -> None:
        """Count one row."""
        text = 0
        for chunk in row:
            self.served[chunk.slice] = self.served.get(chunk.slice, 0) + len(chunk.tokens)
            text += len(chunk.tokens)
        self.special += SPECIALS * len(row)
        self.padding += seq_len - text - SPECIALS * len(row)

    def serve_choice(self, task: str, choice: choices.Choice, seq_len: int) -> None:
        """Count one ending of an item."""
        text = len(choice.context) + len(choice.ending)
        for counts in (self.drawn, self.served):
            counts[task] = counts.get(task, 0) + text
        self.special += choices.SPECIALS
        self.padding += seq_len - text - choices.SPECIALS
        self.cuts += choice.cut

    def add(self, other: "PhaseAccount") -> None:
        """Count what another rank counted."""
        for mine, theirs in ((self.drawn, other.drawn), (self.served, other.served)):
            for name, tokens in theirs.items():
                mine[name] = mine.get(name, 0) + tokens
        self.skipped += other.skipped
        self.special += other.special
        self.padding += other.padding
        self.cuts += other.cuts


@dataclass
class DataState:
    """All that the data path needs to go on after a step; plain values."""

    tokens_seen: int = 0
    phase: str = ""
    lanes: dict[int, dict[str, Any]] = field(default_factory=dict)
    accounts: dict[str, PhaseAccount] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The state as plain values, for a checkpoint."""
        accounts = {
            phase: {**vars(account), "drawn": dict(account.drawn), "served": dict(account.served)}
            for phase, account in self.accounts.items()
        }
        return {"tokens_seen": self.tokens_seen, "phase": self.phase, "lanes": self.lanes, "accounts": accounts}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "DataState":
        """The inverse of `to_dict`."""
        accounts = {
            phase: PhaseAccount(**{**account, "drawn": dict(account["drawn"]), "served": dict(account["served"])})
            for phase, account in state["accounts"].items()
        }
        return cls(state["tokens_seen"], state["phase"], dict(state["lanes"]), accounts)


@dataclass
class Step:
    """What one rank does in one optimizer step."""

    micro_batches: list[MicroBatch]
    targets: int
    """Predicted tokens of this rank's rows."""
    tokens: int
    """Tokens of this rank's rows, padding left out."""
    state: dict[str, Any]
    """The `DataState` after the step."""

    def pin_memory(self) -> "Step":
        """The same in memory that a GPU copies from while it computes."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])

    def __reduce__(self) -> tuple[Any, ...]:
        """A step crosses to another process as some arrays, however many micro-batches it has.

        torch would hand over each tensor in shared memory of its own, of which a container has little, by a file descriptor of
        its own, of which a process has few.
        """
        tensors = [[getattr(batch, name) for batch in self.micro_batches] for name in _TENSORS]
        arrays = [np.concatenate([tensor.numpy() for tensor in same], dtype=np.int32) for same in tensors]
        sizes = [[len(tensor) for tensor in same] for same in tensors]
        others = [{name: getattr(batch, name) for name in _NUMBERS} for batch in self.micro_batches]
        return _arrived, (arrays, sizes, others, self.targets, self.tokens, self.state)


_TENSORS = {"input_ids": torch.int64, "cu_seqlens": torch.int32, "target_positions": torch.int64, "targets": torch.int64}
"""Tensors of a micro-batch. All their values fit 32 bits: token ids, and positions in a micro-batch."""
_NUMBERS = ("max_seqlen", "num_tokens", "first_row", "objective")
"""All else of a micro-batch."""


def _arrived(arrays: list[np.ndarray], sizes: list[list[int]], others: list[dict[str, Any]], *rest: Any) -> Step:
    """The inverse of `Step.__reduce__`: micro-batches are views of what came."""
    whole = [torch.from_numpy(array).to(dtype) for array, dtype in zip(arrays, _TENSORS.values(), strict=True)]
    parts = [tensor.split(own) for tensor, own in zip(whole, sizes, strict=True)]
    micro_batches = [
        MicroBatch(**dict(zip(_TENSORS, tensors, strict=True)), **numbers)
        for *tensors, numbers in zip(*parts, others, strict=True)
    ]
    return Step(micro_batches, *rest)


class Steps:
    """The steps of one rank from a state on, in order, to the end of the curriculum."""

    def __init__(self, run: Run, curriculum: Curriculum, corpus: Corpus, rank: int, world_size: int, state: DataState) -> None:
        self.run = run
        self.curriculum = curriculum
        self.corpus = corpus
        self.rank = rank
        self.world_size = world_size
        self.state = state
        self.mixes = open_mixes(run, corpus)
        self.tasks = {name: choices.Choices(name, task, corpus, run.seed) for name, task in run.tasks.items()}

    def __iter__(self) -> Iterator[Step]:
        """Make steps, one optimizer step each."""
        state = DataState.from_dict(self.state.to_dict())
        if self.rank:  # rank 0 carries on the account of all ranks
            state.accounts = {phase: PhaseAccount() for phase in state.accounts}
        lanes = self._restored(state)
        for point in self.curriculum.steps(state.tokens_seen):
            account = state.accounts.setdefault(point.phase, PhaseAccount())
            if point.objective == MASKED_LM:
                lanes = self._in_phase(point.phase, state, lanes)
                micro_batches = self._micro_batches(point, lanes, account)
            else:
                micro_batches = self._task_batches(point, account)
            state.tokens_seen += point.step_tokens
            state.lanes = {number: lane.state() for number, lane in lanes.items()}
            yield Step(
                micro_batches=micro_batches,
                targets=sum(len(batch.targets) for batch in micro_batches),
                tokens=sum(batch.num_tokens for batch in micro_batches if len(batch.targets)),
                state=state.to_dict(),
            )

    def check(self) -> None:
        """Open the windows that the state names; ValueError when they do not come out as they were."""
        self._restored(self.state)

    def skip(self, tokens: int) -> DataState:
        """The state here, with the next rows, of so much capacity, passed by; one rank serves all lanes."""
        assert self.world_size == 1
        state = DataState.from_dict(self.state.to_dict())
        point = self.curriculum.at(state.tokens_seen)
        if not reads_text(self.run.phases[point.phase]):
            raise ValueError(f"--skip-tokens {tokens}: phases.{point.phase}, where the checkpoint is, reads no text")
        lanes = self._in_phase(point.phase, state, self._restored(state))
        account = state.accounts.setdefault(point.phase, PhaseAccount())
        for row in range(point.first_row, point.first_row - (-tokens // point.seq_len)):
            lane = lanes[row % self.run.data.lanes]
            account.skipped += sum(len(chunk.tokens) for chunk in lane.next_row())
            _count_draws(account, lane)
        state.lanes = {number: lane.state() for number, lane in lanes.items()}
        return state

    def _restored(self, state: DataState) -> dict[int, Lane]:
        """This rank's lanes as they stood."""
        return {
            lane: self._lane(lane, state.phase, LaneState(**saved))
            for lane, saved in state.lanes.items()
            if lane % self.world_size == self.rank
        }

    def _in_phase(self, phase: str, state: DataState, lanes: dict[int, Lane]) -> dict[int, Lane]:
        """The lanes, moved on to a phase when it is a new one."""
        if phase == state.phase:
            return lanes
        state.phase = phase
        return self._enter(phase, lanes)

    def _micro_batches(self, point: Point, lanes: dict[int, Lane], account: PhaseAccount) -> list[MicroBatch]:
        masker = Masker(self.corpus.roles, self.corpus.ordinary_ids, point.mask_ratio)
        phase = list(self.run.phases).index(point.phase)
        numbers = [
            row for row in range(point.first_row, point.first_row + point.batch_rows)
            if row % self.run.data.lanes in lanes
        ]  # fmt: skip
        rows: list[Row] = []
        for number in numbers:
            lane = lanes[number % self.run.data.lanes]
            rows.append(lane.next_row())
            account.serve(rows[-1], point.seq_len)
            _count_draws(account, lane)
        seeds = [(self.run.seed, phase, number) for number in numbers]
        size = max(1, self.run.trainer.micro_batch_tokens // point.seq_len)
        micro_batches = [
            masker.batch(rows[at : at + size], seeds[at : at + size], numbers[at]) for at in range(0, len(rows), size)
        ]
        # Ranks run the same number of them, even where some have a row less: collectives in a forward pass must pair up.
        idle = -(-most_rows(point, self.run.data.lanes, self.world_size) // size) - len(micro_batches)
        return micro_batches + [masker.batch([], [], first_row=0)] * idle

    def _task_batches(self, point: Point, account: PhaseAccount) -> list[MicroBatch]:
        task, source = self.run.tasks[point.objective], self.tasks[point.objective]
        numbers = [
            number for number in range(point.first_item, point.first_item + task.batch_items)
            if number % self.world_size == self.rank
        ]  # fmt: skip
        drawn = [source.drawn(number) for number in numbers]
        items = [source.encoded(item) for item in drawn]
        for choice in (choice for item in items for choice in item):
            account.serve_choice(point.objective, choice, task.seq_len)
        size = items_at_once(task, self.run.trainer.micro_batch_tokens)
        starts = range(0, -(-task.batch_items // self.world_size), size)  # as many as any rank has
        labels = [item.label for item in drawn]
        return [
            source.collate(items[at : at + size], labels[at : at + size], numbers[at] if at < len(numbers) else 0)
            for at in starts
        ]

    def _enter(self, phase: str, before: dict[int, Lane]) -> dict[int, Lane]:
        """Lanes at the start of a phase: passes over the slices go on, open windows of the phase before are left."""
        mine = range(self.rank, self.run.data.lanes, self.world_size)
        return {
            lane: self._lane(
                lane,
                phase,
                LaneState(
                    blocks=before[lane].blocks_drawn() if before else {},
                    tokens=self.mixes[phase].head_start(lane),
                ),
            )
            for lane in mine
        }

    def _lane(self, lane: int, phase: str, state: LaneState) -> Lane:
        data = self.run.data
        seed = (self.run.seed, list(self.run.phases).index(phase))
        seq_len = self.run.phases[phase].seq_len
        return Lane(lane, data.lanes, self.mixes[phase], seq_len, data.window_rows, seed, state)


def most_rows(point: Point, lanes: int, world_size: int) -> int:
    """Rows of the rank that has the most in a step."""
    rows = np.arange(point.first_row, point.first_row + point.batch_rows)
    return int(np.bincount(rows % lanes % world_size).max())


def _count_draws(account: PhaseAccount, lane: Lane) -> None:
    for name, tokens in lane.drawn.items():
        account.drawn[name] = account.drawn.get(name, 0) + tokens
    account.cuts += lane.cuts
    lane.drawn, lane.cuts = {}, 0


def open_mixes(run: Run, corpus: Corpus) -> dict[str, Mix]:
    """The mix of each phase that reads text, opened; FileNotFoundError or ValueError names a shard that is not whole."""
    return {name: Mix(corpus, phase.mix, run.data.lanes, run.seed) for name, phase in run.phases.items() if reads_text(phase)}


def fingerprint(run: Run, corpus: Corpus) -> dict[str, Any]:
    """Hashes of all that the run reads: they change with any token, and with the file of any task."""
    tasks = {name: choices.fingerprint(Path(task.train)) for name, task in run.tasks.items()}
    return {"corpus": corpus.fingerprint(phase.mix for phase in run.phases.values()), "tasks": tasks}


def merge(states: list[DataState]) -> DataState:
    """The state of a run from those of its ranks after the same step: any number of ranks can go on from it."""
    merged = DataState(states[0].tokens_seen, states[0].phase)
    for state in states:
        merged.lanes.update(state.lanes)
        for phase, account in state.accounts.items():
            merged.accounts.setdefault(phase, PhaseAccount()).add(account)
    return merged
