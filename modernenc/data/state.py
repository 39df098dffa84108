"""The state of the data path after an optimizer step, as a checkpoint holds it: lanes and token counts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modernenc.data import choices
from modernenc.data.lanes import Lane, Row
from modernenc.data.packing import SPECIALS


@dataclass
class TokenCounts:
    """How many tokens one phase has used so far, and for what."""

    drawn: Counter[str] = field(default_factory=Counter)
    """Text tokens of each slice that were drawn into packing buffers, and of each task."""
    served: Counter[str] = field(default_factory=Counter)
    """Text tokens of each slice or task that reached an optimizer step. Those drawn but neither served nor skipped are in
    open buffers, or were dropped with them at the end of the phase."""
    skipped: int = 0
    """Text tokens of rows that a rollback skipped."""
    special: int = 0
    """Special tokens added around chunks and choices."""
    padding: int = 0
    """Row capacity that was left empty."""
    cuts: int = 0
    """Artificial document boundaries: cuts at the row length or at a block's end, and truncated choices."""

    def add_row(self, row: Row, seq_len: int) -> None:
        """Count one row that was served."""
        for chunk in row:
            self.served[chunk.slice] += len(chunk.tokens)
        self._add_capacity(seq_len, sum(len(chunk.tokens) for chunk in row), SPECIALS * len(row))

    def add_choice(self, task: str, choice: choices.Choice, seq_len: int) -> None:
        """Count one choice of an item, which is drawn and served at once."""
        text = len(choice.context) + len(choice.ending)
        self.drawn[task] += text
        self.served[task] += text
        self.cuts += choice.cut
        self._add_capacity(seq_len, text, choices.SPECIALS)

    def add_draws(self, lane: Lane) -> None:
        """Count what a lane has drawn since the last call, and reset the counters of the lane."""
        self.drawn.update(lane.drawn)
        self.cuts += lane.cuts
        lane.drawn, lane.cuts = Counter(), 0

    def add(self, other: "TokenCounts") -> None:
        """Add the counts of another rank."""
        self.drawn.update(other.drawn)
        self.served.update(other.served)
        for name in ("skipped", "special", "padding", "cuts"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _add_capacity(self, seq_len: int, text: int, special: int) -> None:
        self.special += special
        self.padding += seq_len - text - special


@dataclass
class DataState:
    """All that the data path needs in order to continue after an optimizer step."""

    tokens_seen: int = 0
    phase: str = ""
    lanes: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The `LaneState` of each lane as plain values."""
    token_counts: dict[str, TokenCounts] = field(default_factory=dict)
    """Token counts of each phase that has begun."""

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values, which a checkpoint can hold; later changes of the counts do not reach them."""
        counts = {
            phase: {**vars(counts), "drawn": dict(counts.drawn), "served": dict(counts.served)}
            for phase, counts in self.token_counts.items()
        }
        return {**vars(self), "token_counts": counts}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "DataState":
        """Return the state that `to_dict` turned into plain values."""
        counts = {
            phase: TokenCounts(**{**saved, "drawn": Counter(saved["drawn"]), "served": Counter(saved["served"])})
            for phase, saved in state["token_counts"].items()
        }
        return cls(**{**state, "lanes": dict(state["lanes"]), "token_counts": counts})


def merge_rank_states(states: Sequence[DataState]) -> DataState:
    """Combine the states of all ranks after the same step into one, from which any number of ranks can continue."""
    merged = DataState(states[0].tokens_seen, states[0].phase)
    for state in states:
        merged.lanes.update(state.lanes)
        for phase, counts in state.token_counts.items():
            merged.token_counts.setdefault(phase, TokenCounts()).add(counts)
    return merged
