"""Train a recipe: `python -m modernenc.train +recipe=NAME`."""

import os

from modernenc.cli import run
from modernenc.config import Run, register

LEADING_RUN_DIR = "MODERNENC_RUN_DIR"
"""Tells further ranks the folder of the first, whose name holds the time."""


def main(config: Run) -> None:
    """Check the run, then train it in a new folder."""
    from modernenc.checks import check_hardware, check_run

    curriculum, corpus = check_run(config)
    check_hardware(config)

    from modernenc.data.loader import open_mixes
    from modernenc.fit import fit, start  # torch and Lightning take seconds to import: mistakes are told before

    open_mixes(config, corpus)
    if launched := os.environ.get(LEADING_RUN_DIR):  # a further rank, launched by Lightning with the same command
        config.run_dir = launched
    config.data.root = str(corpus.root.resolve())  # a run may be resumed from another folder
    if not launched:
        start(config, curriculum)
        os.environ[LEADING_RUN_DIR] = config.run_dir
    fit(config, curriculum, corpus, checkpoint=None)


if __name__ == "__main__":
    register()
    run(Run, "recipe", "train", main)
