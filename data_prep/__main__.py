"""Prepare a corpus: `python -m data_prep +corpus=NAME`."""

from data_prep.config import CorpusConfig, register
from modernenc.cli import run


def main(corpus: CorpusConfig) -> None:
    """Prepare the corpus of a configuration."""
    from data_prep.build import build  # takes seconds to import, which --help and a wrong configuration should not cost

    build(corpus)


if __name__ == "__main__":
    register()
    run(CorpusConfig, ("corpus",), "prepare", main)
