"""Train a recipe: `python -m modernenc.train +recipe=NAME`."""

from modernenc.cli import run
from modernenc.config import Run, register


def main(config: Run) -> None:
    """Check the run, then train it in a new folder."""
    from modernenc.checks import check_run

    curriculum, corpus = check_run(config)

    from modernenc.data.loader import open_mixes
    from modernenc.fit import fit, start  # torch and Lightning take seconds to import: mistakes are told before

    open_mixes(config, corpus)
    start(config, curriculum)
    fit(config, curriculum, corpus, checkpoint=None)


if __name__ == "__main__":
    register()
    run(Run, "recipe", "train", main)
