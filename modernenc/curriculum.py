"""The curriculum: a table of phases and one pure function of the tokens seen.

`plan` prints this object, the trainer obeys it, the report draws it. The clock is `tokens_seen`: row capacity (rows x
seq_len) of all optimizer steps so far, so that step and tokens determine each other in closed form.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from modernenc.config import Phase


def constant(progress: float, final: float) -> float:
    """1 throughout."""
    return 1.0


def linear(progress: float, final: float) -> float:
    """`1 - (1 - final) progress`."""
    return 1 - (1 - final) * progress


def cosine(progress: float, final: float) -> float:
    """`final + (1 - final) (1 + cos(pi progress)) / 2`: Loshchilov and Hutter 2016, arXiv:1608.03983, equation 5."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def one_minus_sqrt(progress: float, final: float) -> float:
    """`final + (1 - final) (1 - sqrt(progress))`: Hägele et al. 2024, arXiv:2405.18392, section 3."""
    return final + (1 - final) * (1 - math.sqrt(progress))


LR_CURVES: dict[str, Callable[[float, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "one_minus_sqrt": one_minus_sqrt,
}
"""Factor on the phase's peak learning rate, by progress in [0, 1] from the end of its warmup to its own end, and by its final
factor."""
EQUAL = ("steps", "tokens")
"""What levels of a batch-size ramp may have the same number of."""


@dataclass(frozen=True)
class Level:
    """A stretch of equal steps: one ramp level of one phase."""

    phase: str
    batch_rows: int
    seq_len: int
    steps: int
    first_step: int
    first_tokens: int

    @property
    def step_tokens(self) -> int:
        """Row capacity of one optimizer step."""
        return self.batch_rows * self.seq_len

    @property
    def end_tokens(self) -> int:
        """Tokens seen when the level is over."""
        return self.first_tokens + self.steps * self.step_tokens


@dataclass(frozen=True)
class Point:
    """All that the curriculum says about the step that starts at `tokens_seen`."""

    tokens_seen: int
    step: int
    phase: str
    phase_tokens: int
    """Tokens seen since the phase started."""
    lr: float
    """Learning rate on the scale of `optim.lr`."""
    peak_lr: float
    """Peak of the phase on the same scale."""
    weight_decay: float
    batch_rows: int
    seq_len: int
    mask_ratio: float
    backbone: dict[str, Any]
    """Attributes of the backbone set by this phase or, unless it says otherwise, by those before it."""

    @property
    def step_tokens(self) -> int:
        """Row capacity of the step."""
        return self.batch_rows * self.seq_len

    @property
    def first_row(self) -> int:
        """Number of the step's first row, counted from the start of the phase."""
        return self.phase_tokens // self.seq_len


@dataclass(frozen=True)
class Curriculum:
    """The table of phases, in order.

    Raises ValueError, naming the key, for a phase that cannot be trained.
    """

    phases: dict[str, Phase]
    levels: tuple[Level, ...] = field(init=False)
    _backbone: dict[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("phases is empty; a recipe needs at least one phase")
        for name, phase in self.phases.items():
            _check(name, phase)
        object.__setattr__(self, "levels", tuple(_levels(self.phases)))
        attributes = accumulate((phase.backbone for phase in self.phases.values()), lambda before, new: {**before, **new})
        object.__setattr__(self, "_backbone", dict(zip(self.phases, attributes, strict=True)))

    @property
    def total_tokens(self) -> int:
        """Tokens seen when the last phase is over."""
        return self.levels[-1].end_tokens

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole curriculum."""
        return self.levels[-1].first_step + self.levels[-1].steps

    def levels_of(self, phase: str) -> list[Level]:
        """The ramp levels of one phase; a single one without a ramp."""
        return [level for level in self.levels if level.phase == phase]

    def start_of(self, phase: str) -> int:
        """Tokens seen when `phase` starts."""
        return self.levels_of(phase)[0].first_tokens

    def end_of(self, phase: str) -> int:
        """Tokens seen when `phase` is over."""
        return self.levels_of(phase)[-1].end_tokens

    def at(self, tokens_seen: int) -> Point:
        """What holds for the step that starts at, or is under way at, `tokens_seen` in [0, total_tokens]."""
        index = bisect_right(self.levels, tokens_seen, key=lambda level: level.first_tokens) - 1
        level = self.levels[index]
        phase = self.phases[level.phase]
        phase_tokens = tokens_seen - self.start_of(level.phase)
        return Point(
            tokens_seen=tokens_seen,
            step=level.first_step + (tokens_seen - level.first_tokens) // level.step_tokens,
            phase=level.phase,
            phase_tokens=phase_tokens,
            lr=phase.lr * _lr_factor(phase, phase_tokens),
            peak_lr=phase.lr,
            weight_decay=phase.weight_decay,
            batch_rows=level.batch_rows,
            seq_len=level.seq_len,
            mask_ratio=phase.mask_ratio,
            backbone=self._backbone[level.phase],
        )

    def steps(self, tokens_seen: int = 0) -> Iterator[Point]:
        """Each optimizer step from the one that starts at `tokens_seen` to the last."""
        while tokens_seen < self.total_tokens:
            point = self.at(tokens_seen)
            yield point
            tokens_seen += point.step_tokens


def _lr_factor(phase: Phase, tokens: int) -> float:
    """Share of the phase's peak learning rate, `tokens` after its start."""
    warmup = phase.warmup_tokens
    if tokens < warmup:
        return phase.first_lr_factor + (1 - phase.first_lr_factor) * tokens / warmup
    progress = min(1.0, (tokens - warmup) / (phase.tokens - warmup)) if phase.tokens > warmup else 1.0
    return LR_CURVES[phase.lr_curve](progress, phase.final_lr_factor)


def _levels(phases: dict[str, Phase]) -> Iterator[Level]:
    step = tokens = 0
    for name, phase in phases.items():
        start = tokens
        for batch_rows, budget in _budgets(phase):
            step_tokens = batch_rows * phase.seq_len
            # The clock may already be past this level's budget: a level of the ramp then has no step at all.
            steps = max(0, math.ceil((start + budget - tokens) / step_tokens))
            if steps:
                yield Level(name, batch_rows, phase.seq_len, steps, step, tokens)
            step += steps
            tokens += steps * step_tokens


def _budgets(phase: Phase) -> Iterator[tuple[int, float]]:
    """Rows of each level and the tokens of the phase at its end."""
    ramp = phase.ramp
    if ramp.tokens:
        rows = range(ramp.start_rows, phase.batch_rows, ramp.step_rows)
        weights = [1 if ramp.equal == "tokens" else level for level in rows]
        for level, seen in zip(rows, accumulate(weights), strict=True):
            yield level, ramp.tokens * seen / sum(weights)
    yield phase.batch_rows, phase.tokens


def _check(name: str, phase: Phase) -> None:
    """Raise ValueError for the first value of the phase that cannot be obeyed."""
    ramp = phase.ramp

    def require(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            raise ValueError(f"phases.{name}.{key}={value}: expected {expected}")

    for key in ("tokens", "warmup_tokens"):
        require(float(getattr(phase, key)).is_integer(), key, getattr(phase, key), "a whole number of tokens")
    require(phase.tokens > 0, "tokens", phase.tokens, "a positive budget")
    require(phase.seq_len >= 8, "seq_len", phase.seq_len, "at least 8 tokens")
    require(phase.batch_rows >= 1, "batch_rows", phase.batch_rows, "at least 1 row")
    require(phase.lr > 0, "lr", phase.lr, "a positive learning rate")
    require(phase.lr_curve in LR_CURVES, "lr_curve", phase.lr_curve, f"one of {', '.join(LR_CURVES)}")
    require(0 <= phase.warmup_tokens <= phase.tokens, "warmup_tokens", phase.warmup_tokens, "at most the phase's tokens")
    require(0 <= phase.first_lr_factor <= 1, "first_lr_factor", phase.first_lr_factor, "a share in [0, 1]")
    require(0 <= phase.final_lr_factor <= 1, "final_lr_factor", phase.final_lr_factor, "a share in [0, 1]")
    require(phase.weight_decay >= 0, "weight_decay", phase.weight_decay, "0 or more")
    require(0 < phase.mask_ratio < 1, "mask_ratio", phase.mask_ratio, "a share in (0, 1)")
    require(any(phase.mix.values()), "mix", phase.mix, "at least one source with a share, such as {wiki: 1}")
    for source, share in phase.mix.items():
        require(share >= 0, f"mix.{source}", share, "a share, or 0 to leave the source out")
    if ramp.tokens:
        require(0 < ramp.tokens < phase.tokens, "ramp.tokens", ramp.tokens, f"less than the phase's {phase.tokens:.0f}")
        require(
            0 < ramp.start_rows < phase.batch_rows,
            "ramp.start_rows", ramp.start_rows, f"1 to {phase.batch_rows - 1}, below batch_rows",
        )  # fmt: skip
        require(ramp.step_rows > 0, "ramp.step_rows", ramp.step_rows, "at least 1 row")
        require(ramp.equal in EQUAL, "ramp.equal", ramp.equal, f"one of {', '.join(EQUAL)}")
