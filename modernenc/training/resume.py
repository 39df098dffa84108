"""Go on with a run from one of its checkpoints, under its own settings or, after a rollback, under others."""

import logging
from dataclasses import replace
from pathlib import Path

from modernenc.cli import checkpoint_argument
from modernenc.config import Phase, Run
from modernenc.data.loader import Steps
from modernenc.data.state import DataState
from modernenc.planning.branch import check_same_run, done_phases, fork
from modernenc.planning.checks import check_run, check_settings
from modernenc.planning.model_checks import check_backbone, check_optim
from modernenc.planning.tables import plan_text
from modernenc.reporting import page
from modernenc.run_folder import checkpoints
from modernenc.run_folder.checkpoints import Checkpoint
from modernenc.run_folder.history import prepare_rollback
from modernenc.run_folder.lineage import ABANDONED, Event
from modernenc.run_folder.load import check_root, locate
from modernenc.saved_config import apply_overrides, from_plain
from modernenc.training import ranks
from modernenc.training.fit import fit
from modernenc.training.hardware import check_hardware
from modernenc.training.recorder import is_missing

log = logging.getLogger("modernenc")


def resume(path: Path, overrides: list[str]) -> None:
    """Resume from a run folder or a checkpoint; ValueError or FileNotFoundError names what is wrong."""
    run, file = _locate(path)
    check_root(run, overrides)
    if file is None:
        if run.branch_from:
            raise FileNotFoundError(f"{run.run_dir} has lost its branch.ckpt; branch again, into another run_dir")
        return _go_on(apply_overrides(run, overrides), None, Event("resume"))
    checkpoint, event = checkpoints.read(file), Event("resume", file.stem)
    if checkpoint.run["rollbacks"] > run.rollbacks:  # a rollback was interrupted after its checkpoint was written
        run, event = from_plain(checkpoint.run, run.run_dir), checkpoint.event
    check_same_run(run, file, checkpoint)
    others = (checkpoints.sort_key(other) for other in file.parent.glob("*.ckpt") if checkpoints.is_finished(other))
    if path.suffix == ".ckpt" and any(checkpoints.sort_key(file) < other for other in others):
        checkpoint = prepare_rollback(run, checkpoint, Event("rollback", file.stem))
        run, event = from_plain(checkpoint.run, run.run_dir), checkpoint.event
    _go_on(apply_overrides(run, overrides), checkpoint, event)


def rollback(path: Path, overrides: list[str], skip_tokens: int) -> None:
    """Go back to a checkpoint, and on under other settings; ValueError or FileNotFoundError names what is wrong."""
    now, file = _locate(path)
    longest = int(sum(phase.tokens for phase in now.phases.values()))
    if not 0 <= skip_tokens <= longest:
        raise ValueError(f"--skip-tokens {skip_tokens}: expected 0 to {longest}, the tokens of the whole run")
    check_root(now, overrides)
    assert file is not None
    checkpoint = checkpoints.read(file)
    before = replace(from_plain(checkpoint.run, now.run_dir), rollbacks=now.rollbacks)
    run = apply_overrides(before, overrides)
    check_settings(run)
    run = _follow_optimizer(before, run, overrides)
    for name in done_phases(before, checkpoint.state.tokens_seen):
        if any(override.startswith(f"phases.{name}.") for override in overrides):
            raise ValueError(f"phases.{name}: the checkpoint is at its end or past it: what was trained already cannot change")
    _, corpus = check_run(run)
    run = replace(run, data=replace(run.data, root=str(corpus.store)))
    event = Event("rollback", file.stem, changed=overrides, skipped_tokens=skip_tokens)
    checkpoint = prepare_rollback(run, fork(run, corpus, checkpoint, skip_tokens), event)
    _go_on(from_plain(checkpoint.run), checkpoint, checkpoint.event)


def _locate(path: Path) -> tuple[Run, Path | None]:
    run, file = locate(path)
    if Path(run.run_dir).parent.name == ABANDONED:
        raise ValueError(
            f"{path} was abandoned by a rollback; branch from it with python -m modernenc.train +recipe={run.recipe} "
            f"+from={checkpoint_argument(path)}"
        )
    return run, file


def _go_on(run: Run, checkpoint: Checkpoint | None, event: Event) -> None:
    curriculum, corpus = check_run(run)
    run = replace(run, data=replace(run.data, root=str(corpus.store)))
    check_hardware(run)
    check_backbone(run)
    check_optim(run)
    at_end = checkpoint is not None and checkpoint.state.tokens_seen >= curriculum.total_tokens
    if checkpoint and at_end and not is_missing(run, checkpoint.state.phase, checkpoint.state.step):
        print(f"{run.run_dir} is finished: {event.checkpoint} is at the end of the curriculum")
        if ranks.is_rank_zero() and not (Path(run.run_dir) / page.REPORT).exists():
            page.write(run)
        return
    if event.event == "rollback" and checkpoint:  # which changes the run folder: verify first that the data are as they were
        Steps(run, curriculum, corpus, 0, 1, DataState.from_dict(checkpoint.state.data)).check()
    fit(run, curriculum, corpus, plan_text(run, curriculum), checkpoint, event)
    if ranks.is_rank_zero():
        log.info("report: %s", page.write(run))


def _follow_optimizer(before: Run, run: Run, overrides: list[str]) -> Run:
    """Return the run with phases that follow a change of `optim` where they took its value when the run started.

    A value of a phase that `overrides` change stays as it is.
    """
    changed_keys = {override.partition("=")[0] for override in overrides}

    def follow(name: str, phase: Phase) -> Phase:
        lr, weight_decay = phase.lr, phase.weight_decay
        if f"phases.{name}.lr" not in changed_keys and lr == before.optim["lr"]:
            lr *= run.optim["lr"] / before.optim["lr"]
        if f"phases.{name}.weight_decay" not in changed_keys and weight_decay == before.optim["weight_decay"]:
            weight_decay = run.optim["weight_decay"]
        return replace(phase, lr=lr, weight_decay=weight_decay)

    return replace(run, phases={name: follow(name, phase) for name, phase in run.phases.items()})
