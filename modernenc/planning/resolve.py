"""Resolve a composed configuration into the run that is trained, planned or submitted."""

from modernenc.config import Run
from modernenc.planning.sizes import choose_sizes


def resolve(run: Run) -> Run:
    """Return the run scaled down if it is a smoke test, else with the sizes that its corpus chooses.

    Raises FileNotFoundError or ValueError if a smoke test lacks its corpus, or the corpus lacks a source of a mix.
    """
    if run.smoke_test:
        from modernenc.planning.smoke_test import scale_down  # imports torch

        return scale_down(run)
    return choose_sizes(run)
