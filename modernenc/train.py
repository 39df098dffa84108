"""Train a recipe: `python -m modernenc.train +recipe=NAME`."""

from pathlib import Path

from modernenc import ranks
from modernenc.cli import run
from modernenc.config import Run, register


def main(config: Run) -> None:
    """Check the run, then train it in a new folder, from the start or from another run's checkpoint."""
    from modernenc.checks import check_hardware, check_run

    curriculum, corpus = check_run(config)
    check_hardware(config)

    from modernenc.data.loader import open_mixes
    from modernenc.fit import fit, start  # torch and Lightning take seconds to import: mistakes are told before

    open_mixes(config, corpus)
    config.data.root = str(corpus.store)  # a run may be resumed from another folder
    content, event = None, {"event": "start", "checkpoint": ""}
    if config.branch_from:
        from modernenc import checkpoints
        from modernenc.branch import fork

        parent = Path(config.branch_from).resolve()
        content = fork(config, corpus, checkpoints.read(parent))
        event = {"event": "branch", "checkpoint": str(parent)}
    if ranks.is_first():  # the folder's name holds the time: the other ranks learn of it when they meet
        start(config, curriculum, content)
    fit(config, curriculum, corpus, content, event)


if __name__ == "__main__":
    register()
    run(Run, ("recipe",), "train", main)
