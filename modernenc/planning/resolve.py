"""Resolve a composed configuration into the run that is trained, planned or submitted."""

from dataclasses import replace
from pathlib import Path

from modernenc.config import Run
from modernenc.planning.sizes import choose_sizes


def resolve(run: Run) -> Run:
    """Return the run scaled down if it is a smoke test, else with the sizes that its corpus chooses.

    Raises FileNotFoundError or ValueError if a smoke test lacks its corpus, the corpus lacks a source of a mix, or a backbone
    that `init.source` should shape has none.
    """
    if not run.backbone.get("_target_"):
        run = _take_shape(run)
    if run.smoke_test:
        from modernenc.planning.smoke_test import scale_down  # imports torch

        return scale_down(run)
    return choose_sizes(run)


def _take_shape(run: Run) -> Run:
    """Return the run with the backbone of its source, in which what the run itself says of the backbone is changed."""
    if not run.init.source:
        raise ValueError("backbone: its shape is that of init.source, which is not set; set it, or choose backbone=NAME")
    from modernenc.model.init_source import backbone_of  # imports torch

    vocabulary = {"vocab_size": 0} if run.init.tokenizer else {}  # 0: the corpus's
    own = {key: value for key, value in run.backbone.items() if key != "_target_"}
    return replace(run, backbone={**backbone_of(Path(run.init.source)), **vocabulary, **own})
