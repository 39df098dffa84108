"""Go on from a checkpoint under changed settings: a rollback within the same run, or a branch in a folder of its own.

Both produce a checkpoint to start from, which holds the new configuration, so that everything after it is an ordinary resume.
The new configuration must agree with the old one on everything that was trained already.
"""

import shlex
import sys
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from modernenc.config import Run, is_identity, is_resumable
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.data.loader import Steps, fingerprint
from modernenc.data.state import DataState
from modernenc.model.build import build_objectives, weights_of
from modernenc.run_folder import checkpoints
from modernenc.run_folder.checkpoints import Checkpoint
from modernenc.saved_config import CONFIG, differences, from_plain, plain

_FIXED = ("seed", "backbone", "data.lanes", "data.buffer_rows", "optim._target_")
"""Settings that the position in the data, or the weights, depend on."""


def check_same_run(run: Run, path: Path, checkpoint: Checkpoint) -> None:
    """Raise ValueError if a checkpoint was trained under other settings than its run folder holds."""
    for key, old, new in differences(checkpoint.run, plain(run)):
        if not is_resumable(key) and not is_identity(key):
            raise ValueError(
                f"{path} was trained with {key}={old}, but {Path(run.run_dir) / CONFIG} has {new}: it is of another "
                f"run; start from it with python -m modernenc.train +recipe={run.recipe} +from={shlex.quote(str(path))}"
            )


def done_phases(run: Run, tokens_seen: int) -> list[str]:
    """Return the phases that end at a position or before it."""
    return [name for name in run.phases if Curriculum.of(run).end_of(name) <= tokens_seen]


def begin_branch(run: Run, corpus: Corpus) -> Checkpoint:
    """Return the checkpoint `run.branch_from` as the start of the run, after listing where it differs from its parent.

    Raises FileNotFoundError if there is no such checkpoint, and ValueError as `fork` does.
    """
    parent = Path(run.branch_from).resolve()
    if parent.suffix != ".ckpt" or not parent.is_file():
        raise FileNotFoundError(f"+from={run.branch_from}: no checkpoint; name one of RUN_DIR/checkpoints/*.ckpt")
    checkpoint = checkpoints.read(parent)
    start = fork(run, corpus, checkpoint)
    for key, there, here in differences(checkpoint.run, start.run):
        if not (is_identity(key) or is_resumable(key)):
            print(f"the branch differs from its parent: {key}={here}, there {there}", file=sys.stderr)
    return start


def fork(run: Run, corpus: Corpus, checkpoint: Checkpoint, skip_tokens: int = 0) -> Checkpoint:
    """Return a checkpoint as the start of a run under other settings, with `skip_tokens` of row capacity of data skipped.

    That run, with the finished phases of the checkpoint, is `run` of what is returned. Raises ValueError, naming the setting,
    if one would change what was trained already.
    """
    state, old = checkpoint.state, checkpoint.run
    before = from_plain(old, run.run_dir)
    if state.phase not in before.phases:
        raise ValueError(f"the checkpoint is at phase {state.phase}, which its run lacks; take another")
    done_before = done_phases(before, state.tokens_seen)
    run = replace(
        run,
        phases={name: before.phases[name] if name in done_before else run.phases[name] for name in run.phases},
        logger=replace(run.logger, group=before.logger.group),
    )
    new = plain(run)
    done = list(old["phases"])[: list(old["phases"]).index(state.phase) + 1]
    if list(new["phases"])[: len(done)] != done:
        raise ValueError(f"phases={', '.join(new['phases'])}: the checkpoint has trained {', '.join(done)}, which come first")
    fixed = (*_FIXED, *(f"phases.{phase}.{key}" for phase in done for key in ("mix", "seq_len", "objectives")))
    for key, there, here in differences(old, new):
        if key.startswith(fixed):
            raise ValueError(f"{key}={here}, but {there} in the checkpoint: what it has trained already cannot change")
    curriculum, position = Curriculum.of(run), state.tokens_seen
    for was, would_be in zip_longest(_stages_before(Curriculum.of(before), position), _stages_before(curriculum, position)):
        if was != would_be:
            raise ValueError(
                f"phases.{was[0] if was else would_be[0]}: up to {position:,} tokens, where the checkpoint is, it had "
                f"{_describe(was)}, now it has {_describe(would_be)}; keep tokens, rows and ramps up to there, and change what "
                "follows"
            )
    data = state.data
    if skip_tokens:
        data = Steps(run, curriculum, corpus, 0, 1, DataState.from_dict(data)).skip(skip_tokens).to_dict()
    boundary = position in {curriculum.end_of(phase) for phase in run.phases}
    weights = checkpoint.weights if old["tasks"].keys() == new["tasks"].keys() else _with_heads(run, checkpoint.weights)
    state = replace(state, data=data, boundary=boundary, **fingerprint(run, corpus))
    return Checkpoint(weights, checkpoint.optimizers, state, new)


def _with_heads(run: Run, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the weights with fresh heads for new tasks, and without the heads of tasks that the run no longer has."""
    heads = {name: value.detach() for name, value in weights_of(build_objectives(run)).items() if name.startswith("tasks.")}
    others = {name: value for name, value in weights.items() if not name.startswith("tasks.")}
    return {**others, **{name: weights.get(name, value) for name, value in heads.items()}}


_StageKey = tuple[str, int, int, int, tuple[int, ...]]


def _describe(stage: _StageKey | None) -> str:
    return f"{stage[1]:,} rows of {stage[2]:,} tokens from step {stage[3]:,} on" if stage else "no further steps"


def _stages_before(curriculum: Curriculum, tokens_seen: int) -> list[_StageKey]:
    """Return what identifies each stage that starts before a position."""
    return [
        (stage.phase, stage.batch_rows, stage.seq_len, stage.first_step, stage.sizes)
        for stage in curriculum.stages
        if stage.first_tokens < tokens_seen
    ]
