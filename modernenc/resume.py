"""Go on with a run: `python -m modernenc.resume RUN_DIR|CKPT [KEY=VALUE ...]`.

A run folder goes on from its newest whole checkpoint, a checkpoint from itself. KEY=VALUE may change where and how fast the
run goes (trainer.*, checkpoint.*, validation.*, watch.*, logger.*, data.root, data.cache,
data.timeout_s, data.workers, and where the files of tasks are), not what it trains.

With --rollback the run goes back to the checkpoint and on from there under other settings, such as optim.lr=1e-4, or past the
data that hurt. What it gives up is kept in its folder `abandoned`. A branch, which leaves the run as it is, is
`python -m modernenc.train +recipe=NAME +from=CKPT`.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any, cast

from modernenc import ranks
from modernenc.cli import one_line_errors
from modernenc.config import TASK_FILES, Run

FREE = (
    "trainer.",
    "checkpoint.",
    "validation.",
    "watch.",
    "logger.",
    "data.root=",
    "data.cache=",
    "data.timeout_s=",
    "data.workers=",
)
"""Keys that do not change what a run trains."""
_FIXED = ("run_dir", "recipe", "rollbacks", "branch_from")


def main() -> None:
    """Resume what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m modernenc.resume", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="run folder, or a checkpoint in it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    parser.add_argument("--rollback", action="store_true", help="go back to the checkpoint, under other settings")
    parser.add_argument(
        "--skip-tokens", type=int, default=0, metavar="N", help="with --rollback: pass by the next N tokens of data"
    )
    arguments = parser.parse_intermixed_args()
    with one_line_errors():
        if arguments.rollback:
            rollback(arguments.path, arguments.overrides, arguments.skip_tokens)
        elif arguments.skip_tokens:
            raise ValueError(f"--skip-tokens {arguments.skip_tokens} makes another run: add --rollback")
        else:
            resume(arguments.path, arguments.overrides)
    ranks.leave()


def resume(path: Path, overrides: list[str]) -> None:
    """Resume from a run folder or a checkpoint; ValueError or FileNotFoundError names what is wrong."""
    for override in overrides:
        if not (override.startswith(FREE) or TASK_FILES.match(override)) or "=" not in override:
            raise ValueError(
                f"{override}: a resumed run may change {', '.join(key.rstrip('=') for key in FREE)} only; anything else makes "
                "another run: add --rollback, or branch with python -m modernenc.train +recipe=NAME "
                f"+from={_checkpoint_of(path)}"
            )

    from modernenc import checkpoints
    from modernenc.branch import check_same_run, go_back, take_up

    run, checkpoint = _located(path)
    if checkpoint is None:
        if run.branch_from:
            raise FileNotFoundError(f"{run.run_dir} has lost its branch.ckpt; branch again, into another run_dir")
        return _go_on(changed(run, overrides), None, {"event": "resume", "checkpoint": ""})
    content = checkpoints.read(checkpoint)
    event = {"event": "resume", "checkpoint": checkpoint.stem}
    if content["run"]["rollbacks"] > run.rollbacks:  # a rollback was cut short once its checkpoint was written
        run, event = take_up(content, run.run_dir), content["event"]
    check_same_run(run, checkpoint, content)
    others = (checkpoints.order(other) for other in checkpoint.parent.glob("*.ckpt"))
    if path.suffix == ".ckpt" and any(checkpoints.order(checkpoint) < other for other in others):
        content = go_back(run, content, {"event": "rollback", "checkpoint": checkpoint.stem})
        event = content["event"]
    _go_on(changed(run, overrides), content, event)


def rollback(path: Path, overrides: list[str], skip_tokens: int) -> None:
    """Go back to a checkpoint and on under other settings; ValueError or FileNotFoundError names what is wrong."""
    if path.suffix != ".ckpt":
        raise ValueError(f"{path}: name the checkpoint to go back to, one of {path}/checkpoints/*.ckpt")
    if skip_tokens < 0:
        raise ValueError(f"--skip-tokens {skip_tokens}: expected a number of tokens, 0 or more")
    for override in overrides:
        if override.partition("=")[0] in _FIXED:
            raise ValueError(
                f"{override}: a rollback stays in its run; branch with python -m modernenc.train +recipe=NAME "
                f"+from={_checkpoint_of(path)}"
            )

    from modernenc import checkpoints
    from modernenc.branch import done_phases, fork, go_back, take_up
    from modernenc.checks import check_run, check_settings

    at, checkpoint = _located(path)
    assert checkpoint is not None
    content = checkpoints.read(checkpoint)
    before = take_up(content, at.run_dir)
    before.rollbacks = at.rollbacks
    run = changed(before, overrides)
    check_settings(run)
    run = _rescaled(before, run, overrides)
    for name in done_phases(before, content["state"]["tokens_seen"]):
        if any(override.startswith(f"phases.{name}.") for override in overrides):
            raise ValueError(f"phases.{name}: the checkpoint is at its end or past it: what was trained already cannot change")
    _, corpus = check_run(run)
    run.data.root = str(corpus.store)
    event = {"event": "rollback", "checkpoint": checkpoint.stem, "changed": overrides, "skipped_tokens": skip_tokens}
    content = go_back(run, fork(run, corpus, content, skip_tokens), event)
    _go_on(run, content, content["event"])


def _located(path: Path) -> tuple[Run, Path | None]:
    from modernenc.branch import ABANDONED
    from modernenc.model import locate

    run, checkpoint = locate(path)
    if Path(run.run_dir).parent.name == ABANDONED:
        raise ValueError(
            f"{path} was given up by a rollback; branch from it with python -m modernenc.train +recipe={run.recipe} "
            f"+from={_checkpoint_of(path)}"
        )
    return run, checkpoint


def _checkpoint_of(path: Path) -> str:
    """What a command can name: the path of a checkpoint, or what stands for one of a folder's."""
    return shlex.quote(str(path)) if path.suffix == ".ckpt" else f"{shlex.quote(str(path))}/checkpoints/NAME.ckpt"


def _go_on(run: Run, content: dict[str, Any] | None, event: dict[str, Any]) -> None:
    from modernenc.checks import check_backbone, check_hardware, check_optim, check_run
    from modernenc.data.loader import Steps
    from modernenc.data.state import DataState
    from modernenc.fit import fit

    curriculum, corpus = check_run(run)
    check_hardware(run)
    check_backbone(run)
    check_optim(run)
    if content and content["state"]["tokens_seen"] >= curriculum.total_tokens:
        print(f"{run.run_dir} is finished: {event['checkpoint']} is at the end of the curriculum")
        if ranks.is_first() and not (Path(run.run_dir) / "report.html").exists():
            from modernenc.report import write

            write(run)
        return
    state = DataState.from_dict(content["state"]["data"]) if content else DataState()
    steps = Steps(run, curriculum, corpus, 0, 1, state)
    if event["event"] == "rollback":  # which changes the run folder: see before that the data come out as they were
        steps.check()
    fit(run, curriculum, corpus, content, event)


def changed(run: Run, overrides: list[str]) -> Run:
    """The run with KEY=VALUE settings changed."""
    from omegaconf import OmegaConf

    from modernenc.quoting import assigned

    merged = OmegaConf.structured(run)
    for key, value in assigned(overrides):
        change = OmegaConf.create()
        OmegaConf.update(change, key, value)
        merged = OmegaConf.merge(merged, change)
    return cast(Run, OmegaConf.to_object(merged))


def _rescaled(before: Run, run: Run, overrides: list[str]) -> Run:
    """What phases took from `optim` when the run started follows a change of it, unless it was changed itself."""
    changed = {override.partition("=")[0] for override in overrides}
    for name, phase in run.phases.items():
        if f"phases.{name}.lr" not in changed and phase.lr == before.optim["lr"]:
            phase.lr *= run.optim["lr"] / before.optim["lr"]
        if f"phases.{name}.weight_decay" not in changed and phase.weight_decay == before.optim["weight_decay"]:
            phase.weight_decay = run.optim["weight_decay"]
    return run


if __name__ == "__main__":
    main()
