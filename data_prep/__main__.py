"""Prepare a corpus: `python -m data_prep +corpus=NAME`."""

from data_prep.config import Corpus, register
from modernenc.cli import run


def main(corpus: Corpus) -> None:
    """Prepare what the configuration says."""
    from data_prep.build import build  # several seconds to import: not for --help or a mistake in the configuration

    build(corpus)


if __name__ == "__main__":
    register()
    run(Corpus, ("corpus",), "prepare", main)
