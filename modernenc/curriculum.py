"""The curriculum: a table of phases and one pure function of the tokens seen.

`plan` prints this object, the trainer obeys it, the report draws it. The clock is `tokens_seen`: row capacity (rows x
seq_len) of all optimizer steps so far, so that step and tokens determine each other in closed form. Each step trains one
objective, masked LM or a task of multiple choice, in a cycle that a phase repeats.
"""

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from modernenc import ranges
from modernenc.config import Phase, Run, Task
from modernenc.schedules import LR_CURVES

MASKED_LM = "masked_lm"
"""The objective of text; the others are tasks."""
CAUSAL_LM = "causal_lm"
"""What takes its place in the first steps of a phase with a `causal_share`: each token is predicted from those before it."""
OF_TEXT = (MASKED_LM, CAUSAL_LM)
"""What a step may train that reads text."""
CHOICES = 4
"""Endings of a multiple-choice item, each of which takes a row."""
_MOST_STAGES = 1_000
"""Stages that a ramp may have."""
WATCHED_ROWS = 8
"""Rows of metrics in a phase from which the watch judges by the spread of the rows themselves."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{,63}")
"""Names of phases and tasks, which become parts of file names."""


@dataclass(frozen=True)
class Stage:
    """Consecutive steps with the same batch: one stage of a phase's batch-size ramp, or the phase itself without a ramp."""

    phase: str
    batch_rows: int
    seq_len: int
    cycle: tuple[str, ...]
    """Objectives of successive steps, repeated."""
    sizes: tuple[int, ...]
    """Row capacity of each step of the cycle."""
    steps: int
    first_step: int
    first_tokens: int
    before: Counter[str]
    """Steps of each objective before this stage."""

    @property
    def end_tokens(self) -> int:
        """Tokens seen at the end of the stage."""
        return self.first_tokens + self.tokens_in(self.steps)

    @property
    def last_step_tokens(self) -> int:
        """Row capacity of the last step of the stage."""
        return self.sizes[(self.steps - 1) % len(self.sizes)]

    def tokens_in(self, steps: int) -> int:
        """Return the row capacity of the first `steps` steps of the stage."""
        cycles, rest = divmod(steps, len(self.sizes))
        return cycles * sum(self.sizes) + sum(self.sizes[:rest])

    def steps_in(self, tokens: int) -> int:
        """Return the number of whole steps in the first `tokens` tokens of the stage: the inverse of `tokens_in`."""
        cycles, rest = divmod(tokens, sum(self.sizes))
        return cycles * len(self.sizes) + bisect_right(list(accumulate(self.sizes)), rest)

    def steps_of(self, objective: str, steps: int) -> int:
        """Return how many of the first `steps` steps of the stage train an objective."""
        cycles, rest = divmod(steps, len(self.cycle))
        return cycles * self.cycle.count(objective) + self.cycle[:rest].count(objective)


@dataclass(frozen=True)
class StepSpec:
    """All that the curriculum prescribes for the step that starts at `tokens_seen`."""

    tokens_seen: int
    step: int
    phase: str
    objective: str
    """Objective that the step trains: one of the phase's, or causal LM in place of masked LM."""
    step_tokens: int
    """Row capacity of the step."""
    first_row: int
    """Number of the first row of text that this or a later step reads, counted from the start of the phase."""
    first_item: int
    """Number of a task's first item, counted from the start of the run; 0 for text."""
    lr: float
    """Learning rate on the scale of `optim.lr`."""
    peak_lr: float
    """Peak of the phase on the same scale, for the objective."""
    weight_decay: float
    batch_rows: int
    seq_len: int
    mask_ratio: float
    backbone: dict[str, Any]
    """Attributes of the backbone as set by this phase or, if it does not set them, by an earlier one."""


@dataclass(frozen=True)
class Curriculum:
    """The table of phases, in order, and the tasks that they train.

    Raises ValueError, naming the key, for a phase or a task that cannot be trained.
    """

    phases: dict[str, Phase]
    tasks: dict[str, Task] = field(default_factory=dict)
    stages: tuple[Stage, ...] = field(init=False)
    _backbone: dict[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("phases is empty; a recipe needs at least one phase")
        for name, phase in self.phases.items():
            _check(name, phase)
        _check_tasks(self.phases, self.tasks)
        object.__setattr__(self, "stages", tuple(_stages(self.phases, self.tasks)))
        for stage in self.stages:
            if stage.end_tokens >= 1 << 53:  # up to there a float is exact
                raise ValueError(
                    f"phases.{stage.phase} ends at token {stage.end_tokens:,}: expected less than {1 << 53:,}; lower its "
                    "tokens, batch_rows, seq_len, or the size of its tasks"
                )
        attributes = accumulate((phase.backbone for phase in self.phases.values()), lambda before, new: {**before, **new})
        object.__setattr__(self, "_backbone", dict(zip(self.phases, attributes, strict=True)))

    @classmethod
    def of(cls, run: Run) -> "Curriculum":
        """Return the curriculum of a run."""
        return cls(run.phases, run.tasks)

    @property
    def total_tokens(self) -> int:
        """Tokens seen at the end of the last phase."""
        return self.stages[-1].end_tokens

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole curriculum."""
        return self.stages[-1].first_step + self.stages[-1].steps

    def stages_of(self, phase: str) -> list[Stage]:
        """Return the stages of one phase; a single one without a ramp."""
        return [stage for stage in self.stages if stage.phase == phase]

    def start_of(self, phase: str) -> int:
        """Return the tokens seen when `phase` starts."""
        return self.stages_of(phase)[0].first_tokens

    def end_of(self, phase: str) -> int:
        """Return the tokens seen when `phase` ends."""
        return self.stages_of(phase)[-1].end_tokens

    def at(self, tokens_seen: int) -> StepSpec:
        """Return what is prescribed for the step that `tokens_seen`, in [0, total_tokens], falls into."""
        index = bisect_right(self.stages, tokens_seen, key=lambda stage: stage.first_tokens) - 1
        stage = self.stages[index]
        phase = self.phases[stage.phase]
        step = stage.steps_in(tokens_seen - stage.first_tokens)
        objective = stage.cycle[step % len(stage.cycle)]
        task = self.tasks.get(objective)
        peak_lr = phase.lr * (task.lr_factor if task else 1)
        into_phase = tokens_seen - self.start_of(stage.phase)
        is_causal = objective == MASKED_LM and into_phase < phase.causal_share * phase.tokens
        return StepSpec(
            tokens_seen=tokens_seen,
            step=stage.first_step + step,
            phase=stage.phase,
            objective=CAUSAL_LM if is_causal else objective,
            step_tokens=stage.sizes[step % len(stage.sizes)],
            first_row=self._rows_before(stage) + stage.steps_of(MASKED_LM, step) * stage.batch_rows,
            first_item=(stage.before[objective] + stage.steps_of(objective, step)) * task.batch_items if task else 0,
            lr=peak_lr * _lr_factor(phase, into_phase),
            peak_lr=peak_lr,
            weight_decay=phase.weight_decay,
            batch_rows=stage.batch_rows,
            seq_len=stage.seq_len,
            mask_ratio=phase.mask_ratio,
            backbone=self._backbone[stage.phase],
        )

    def steps(self, tokens_seen: int = 0) -> Iterator[StepSpec]:
        """Yield each optimizer step from the one that starts at `tokens_seen` to the last."""
        while tokens_seen < self.total_tokens:
            spec = self.at(tokens_seen)
            yield spec
            tokens_seen += spec.step_tokens

    def steps_by_objective(self, phase: str) -> dict[str, int]:
        """Return how many steps of a phase train each of its objectives; those of causal LM count as masked LM."""
        stages = self.stages_of(phase)
        return {name: sum(stage.steps_of(name, stage.steps) for stage in stages) for name in dict.fromkeys(stages[0].cycle)}

    def text_tokens(self, phase: str) -> int:
        """Return the row capacity of a phase's masked-LM steps."""
        stages = self.stages_of(phase)
        return sum(stage.steps_of(MASKED_LM, stage.steps) * stage.batch_rows * stage.seq_len for stage in stages)

    def _rows_before(self, stage: Stage) -> int:
        """Return the number of text rows that its phase has before a stage starts."""
        earlier = (other for other in self.stages_of(stage.phase) if other.first_step < stage.first_step)
        return sum(other.steps_of(MASKED_LM, other.steps) * other.batch_rows for other in earlier)


def objectives_of(phase: Phase) -> dict[str, int]:
    """Return how many steps of each objective one cycle of a phase has; an objective without steps is left out."""
    return {name: steps for name, steps in phase.objectives.items() if steps} or {MASKED_LM: 1}


def reads_text(phase: Phase) -> bool:
    """Return whether masked LM is among the objectives of a phase."""
    return MASKED_LM in objectives_of(phase)


def sources_of(run: Run) -> list[str]:
    """Return the sources that a run reads, each of which is validated."""
    return sorted({name.partition("/")[0] for phase in run.phases.values() for name, share in phase.mix.items() if share})


def cycle_tokens(phase: Phase, tasks: dict[str, Task]) -> dict[str, int]:
    """Return the row capacity of each objective in one cycle of full steps."""
    sizes = {name: task.batch_items * CHOICES * task.seq_len for name, task in tasks.items()}
    return {name: steps * sizes.get(name, phase.batch_rows * phase.seq_len) for name, steps in objectives_of(phase).items()}


def items_per_micro_batch(task: Task, micro_batch_tokens: int) -> int:
    """Return how many items fit into the row capacity of one forward pass; at least one."""
    return max(1, micro_batch_tokens // (CHOICES * task.seq_len))


def objective_cycle(phase: Phase) -> list[str]:
    """Return the objectives of successive steps in a cycle: at each step the one that lags most behind its proportion."""
    wanted = objectives_of(phase)
    total = sum(wanted.values())
    done = dict.fromkeys(wanted, 0)
    cycle = []
    for step in range(1, total + 1):
        cycle.append(max(wanted, key=lambda name, step=step: wanted[name] * step - done[name] * total))
        done[cycle[-1]] += 1
    return cycle


def _lr_factor(phase: Phase, tokens: int) -> float:
    """Return the factor on the phase's peak learning rate, `tokens` after the phase's start."""
    warmup = phase.warmup_tokens
    if tokens < warmup:
        return phase.first_lr_factor + (1 - phase.first_lr_factor) * tokens / warmup
    progress = min(1.0, (tokens - warmup) / (phase.tokens - warmup)) if phase.tokens > warmup else 1.0
    return LR_CURVES[phase.lr_curve](progress, phase.final_lr_factor)


def _stages(phases: dict[str, Phase], tasks: dict[str, Task]) -> Iterator[Stage]:
    step = tokens = 0
    before: Counter[str] = Counter()
    for name, phase in phases.items():
        start = tokens
        cycle = objective_cycle(phase)
        for batch_rows, budget in _budgets(phase):
            capacity = cycle_tokens(replace(phase, batch_rows=batch_rows), tasks)
            sizes = [capacity[objective] // cycle.count(objective) for objective in cycle]
            endless = Stage(name, batch_rows, phase.seq_len, tuple(cycle), tuple(sizes), 0, step, tokens, Counter(before))
            # The clock may be past this stage's budget already, and then the stage has no step at all.
            left = math.ceil(start + budget) - tokens
            steps = endless.steps_in(left - 1) + 1 if left > 0 else 0
            if steps:
                yield replace(endless, steps=steps)
            before.update({objective: endless.steps_of(objective, steps) for objective in set(cycle)})
            step += steps
            tokens += endless.tokens_in(steps)
            cycle = cycle[steps % len(cycle) :] + cycle[: steps % len(cycle)]


def _budgets(phase: Phase) -> Iterator[tuple[int, float]]:
    """Yield the rows of each stage, with the tokens of the phase at the stage's end."""
    ramp = phase.ramp
    if ramp.tokens:
        rows = range(ramp.start_rows, phase.batch_rows, ramp.step_rows)
        weights = [1 if ramp.equal == "tokens" else batch_rows for batch_rows in rows]
        for batch_rows, seen in zip(rows, accumulate(weights), strict=True):
            yield batch_rows, ramp.tokens * seen / sum(weights)
    yield phase.batch_rows, phase.tokens


def _check(name: str, phase: Phase) -> None:
    """Raise ValueError for the first value of a phase with which it cannot be trained."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"phases.{name}: expected a name of up to 64 letters, digits, `_`, `-` or `.`: checkpoints bear it")
    ranges.check(f"phases.{name}", Phase, phase)
    ramp = phase.ramp

    def require(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            raise ValueError(f"phases.{name}.{key}={value}: expected {expected}")

    if reads_text(phase):
        require(phase.batch_rows >= 1, "batch_rows", phase.batch_rows, "at least 1 row")
        require(any(phase.mix.values()), "mix", phase.mix, "at least one source with a proportion, such as {wiki: 1}")
    else:
        why = f"because no step trains {MASKED_LM}"
        require(phase.batch_rows == 0, "batch_rows", phase.batch_rows, f"0, {why}")
        require(not any(phase.mix.values()), "mix", phase.mix, f"{{}}, {why}")
        require(not ramp.tokens, "ramp.tokens", ramp.tokens, f"0, {why}")
        require(not phase.causal_share, "causal_share", phase.causal_share, f"0, {why}")
    require(phase.lr_curve in LR_CURVES, "lr_curve", phase.lr_curve, f"one of {', '.join(LR_CURVES)}")
    require(phase.warmup_tokens <= phase.tokens, "warmup_tokens", phase.warmup_tokens, "at most the phase's tokens")
    if ramp.tokens:
        require(ramp.tokens < phase.tokens, "ramp.tokens", ramp.tokens, f"less than the phase's {phase.tokens:.0f}")
        require(
            0 < ramp.start_rows < phase.batch_rows,
            "ramp.start_rows", ramp.start_rows, f"1 to {phase.batch_rows - 1}, below batch_rows",
        )  # fmt: skip
        least = max(1, -(-(phase.batch_rows - ramp.start_rows) // _MOST_STAGES))
        require(
            ramp.step_rows >= least, "ramp.step_rows", ramp.step_rows, f"{least} or more, for {_MOST_STAGES:,} stages at most"
        )


def _check_tasks(phases: dict[str, Phase], tasks: dict[str, Task]) -> None:
    """Raise ValueError for a task with invalid settings, one that no phase trains, or an objective that is no task."""
    wanted = {objective: name for name, phase in phases.items() for objective in objectives_of(phase)}
    for name, phase in wanted.items():
        if name == CAUSAL_LM:
            raise ValueError(f"phases.{phase}.objectives.{name}: is no objective of a cycle; give phases.{phase}.causal_share")
        if name not in (MASKED_LM, *tasks):
            raise ValueError(
                f"phases.{phase}.objectives.{name}: there is no such task; expected {', '.join((MASKED_LM, *tasks))}, or say "
                f"what it is in tasks.{name}"
            )
    for name, task in tasks.items():
        if name in (MASKED_LM, CAUSAL_LM, "all") or not _NAME.fullmatch(name):
            raise ValueError(f"tasks.{name}: the name is taken, or has other signs than letters, digits, `_`, `-` and `.`")
        if name not in wanted:
            raise ValueError(f"tasks.{name} is in the objectives of no phase; name it there, or leave it out")
        ranges.check(f"tasks.{name}", Task, task)
