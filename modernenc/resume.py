"""Go on with a run: `python -m modernenc.resume RUN_DIR|CKPT [KEY=VALUE ...]`.

A run folder goes on from its newest whole checkpoint, a checkpoint from itself. KEY=VALUE may change where and how fast the
run goes (trainer.*, checkpoint.*, validation.*, watch.*, logger.*, data.root, data.cache,
data.timeout_s, data.workers), not what it trains.

With --rollback the run goes back to the checkpoint and on from there under other settings, such as optim.lr=1e-4, or past the
data that hurt. What it gives up is kept in its folder `abandoned`. A branch, which leaves the run as it is, is
`python -m modernenc.train +recipe=NAME +from=CKPT`.
"""

import argparse
from pathlib import Path
from typing import Any, cast

from modernenc.cli import one_line_errors
from modernenc.config import Run

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


def resume(path: Path, overrides: list[str]) -> None:
    """Resume from a run folder or a checkpoint; ValueError or FileNotFoundError names what is wrong."""
    for override in overrides:
        if not override.startswith(FREE) or "=" not in override:
            raise ValueError(
                f"{override}: a resumed run may change {', '.join(key.rstrip('=') for key in FREE)} only; anything else makes "
                f"another run: add --rollback, or branch with python -m modernenc.train +recipe=NAME +from={path}"
            )

    from modernenc.model import locate

    run, checkpoint = locate(path)

    from modernenc import checkpoints
    from modernenc.branch import check_same_run

    content = checkpoints.read(checkpoint) if checkpoint else None
    if checkpoint and content:
        check_same_run(run, checkpoint, content)
    event = {"event": "resume", "checkpoint": checkpoint.stem if checkpoint else ""}
    _go_on(_changed(run, overrides), content, event)


def rollback(path: Path, overrides: list[str], skip_tokens: int) -> None:
    """Go back to a checkpoint and on under other settings; ValueError or FileNotFoundError names what is wrong."""
    if path.suffix != ".ckpt":
        raise ValueError(f"{path}: name the checkpoint to go back to, one of {path}/checkpoints/*.ckpt")

    from modernenc import checkpoints, ranks
    from modernenc.branch import fork, give_up, take_up
    from modernenc.model import locate

    before, checkpoint = locate(path)
    assert checkpoint is not None
    content = checkpoints.read(checkpoint)
    before = take_up(content, before.run_dir)
    run = _rescaled(before, _changed(before, overrides), overrides)

    from modernenc.checks import check_run

    _, corpus = check_run(run)
    content = fork(run, corpus, content, skip_tokens)
    event: dict[str, Any] = {
        "event": "rollback",
        "checkpoint": checkpoint.stem,
        "changed": overrides,
        "skipped_tokens": skip_tokens,
    }
    if ranks.is_first():
        from modernenc.fit import save_config

        run_dir = Path(run.run_dir)
        folder = give_up(run_dir, content["state"]["tokens_seen"])
        event["abandoned"] = str(folder.relative_to(run_dir))
        checkpoints.write(content, run_dir / checkpoints.FOLDER / f"rollback-{folder.name}.ckpt")
        save_config(run)
    _go_on(run, content, event)


def _go_on(run: Run, content: dict[str, Any] | None, event: dict[str, Any]) -> None:
    from modernenc.checks import check_hardware, check_run
    from modernenc.data.loader import open_mixes
    from modernenc.fit import fit

    curriculum, corpus = check_run(run)
    check_hardware(run)
    open_mixes(run, corpus)
    if content and content["state"]["tokens_seen"] >= curriculum.total_tokens:
        print(f"{run.run_dir} is finished: {event['checkpoint']} is at the end of the curriculum")
        return
    fit(run, curriculum, corpus, content, event)


def _changed(run: Run, overrides: list[str]) -> Run:
    from omegaconf import OmegaConf

    return cast(Run, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(run), OmegaConf.from_dotlist(overrides))))


def _rescaled(before: Run, run: Run, overrides: list[str]) -> Run:
    """What phases took from `optim` when the run started follows a change of it, unless it was changed itself."""
    changed = {override.partition("=")[0] for override in overrides}
    for name, phase in run.phases.items():
        if f"phases.{name}.lr" not in changed:
            phase.lr *= run.optim["lr"] / before.optim["lr"]
        if f"phases.{name}.weight_decay" not in changed and phase.weight_decay == before.optim["weight_decay"]:
            phase.weight_decay = run.optim["weight_decay"]
    return run


if __name__ == "__main__":
    main()
