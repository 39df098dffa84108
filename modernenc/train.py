"""Train a recipe: `python -m modernenc.train +recipe=NAME [KEY=VALUE ...]`.

See it first with `python -m modernenc.plan`, try it in a minute with `smoke_test=CORPUS`, branch off another run with
`+from=CKPT` (without a recipe it keeps its parent's settings), train several variants in turn with `--multirun KEY=A,B`. Go on
with a run: `python -m modernenc.resume RUN_DIR`.
"""

import sys
from pathlib import Path

from modernenc.cli import Outcome, end_if_stopped, is_given, run
from modernenc.config import Run, register
from modernenc.planning.resolve import resolve
from modernenc.training.ranks import ending_as_rank


def main(config: Run) -> str:
    """Check the run, train it in a new folder, from the start or from another run's checkpoint, and return the folder."""
    config = resolve(config)
    from modernenc.planning.checks import check_run

    curriculum, corpus = check_run(config)
    from modernenc.training.start import start  # torch and Lightning take seconds to import: most mistakes show before

    return start(config, curriculum, corpus, numbered=not is_given("run_dir"))


def report_sweep(outcomes: list[Outcome], folder: Path) -> None:
    """Print and write the results of a sweep."""
    from modernenc.reporting.sweep import write  # matplotlib takes a second to import

    write(outcomes, folder)


def _resolved_branch(argument: str) -> str:
    """Return `+from=` without symbolic links: each branch of a --multirun points the link `latest` to itself."""
    key, _, value = argument.partition("=")
    return f"{key}={Path(value).resolve()}" if key == "+from" and Path(value).exists() else argument


if __name__ == "__main__":
    sys.argv = [_resolved_branch(argument) for argument in sys.argv]
    register()
    end_if_stopped("start again")
    with ending_as_rank():
        run(Run, ("recipe",), "train", main, report_sweep)
