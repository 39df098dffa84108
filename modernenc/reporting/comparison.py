"""Validation of several checkpoints, and of their averages, on the same held-out rows."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from modernenc.config import Run
from modernenc.data.blocks import Corpus
from modernenc.evaluation.validation import Score, Validator
from modernenc.model.load import masked_lm_of, small_corpus
from modernenc.run_folder.averaging import average
from modernenc.run_folder.checkpoints import Checkpoint, read
from modernenc.run_folder.load import check_root, locate, without_cache
from modernenc.run_folder.tables import ALL
from modernenc.saved_config import apply_overrides

Compared = dict[str, tuple[int, dict[str, Score]]]
"""Tokens seen, and scores by source, of each checkpoint or average by name."""


def compare(paths: list[Path], averages: list[str], across_runs: bool = False, overrides: Sequence[str] = ()) -> Compared:
    """Validate checkpoints and the given kinds of their average.

    `overrides` may be `data.root=` and `data.cache=`, where the held-out text is now. Raises ValueError if the runs have
    different tokenizers; other errors are those of reading checkpoints.
    """
    checkpoints: dict[str, tuple[Run, Path]] = {}
    for path in paths:
        run, checkpoint = locate(path)
        if checkpoint is None:
            raise FileNotFoundError(f"{path} holds no checkpoint yet")
        name = checkpoint.stem if path.suffix == ".ckpt" else path.name
        checkpoints[str(path) if name in checkpoints else name] = run, checkpoint
    first, _ = next(iter(checkpoints.values()))
    check_root(first, overrides)
    first = without_cache(apply_overrides(first, list(overrides)), overrides)
    corpus = Corpus.of(first.data)
    for run, path in checkpoints.values():
        if small_corpus(run).tokenizer_file.read_bytes() != corpus.tokenizer_file.read_bytes():
            raise ValueError(f"{path} has another tokenizer than the first: their losses, in nats per token, do not compare")
    validator = Validator(first, corpus)

    def validate(checkpoint: Checkpoint, path: Path) -> tuple[int, dict[str, Score]]:
        scores = validator.scores_at_reference(masked_lm_of(checkpoint, path))
        return checkpoint.state.tokens_seen, {score.source: score for score in scores}

    compared = {name: validate(read(path), path) for name, (_, path) in checkpoints.items()}
    every = [path for _, path in checkpoints.values()]
    return compared | {f"average: {kind}": validate(average(every, kind, across_runs), every[-1]) for kind in averages}


def show(compared: Compared) -> None:
    """Print the losses of compared checkpoints, one a row and a column for each source, with the lowest loss marked."""
    _, (_, first) = next(iter(compared.items()))
    lowest = min(scores[ALL].loss for _, scores in compared.values())
    table = Table(title="validation, 15 % predicted: nats per token", title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "at token", *first, "accuracy"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for name, (tokens, scores) in compared.items():
        losses = [f"{scores[source].loss:.3f}" for source in first]
        mark = "*" if scores[ALL].loss == lowest else ""
        table.add_row(name + mark, f"{tokens:,}", *losses, f"{scores[ALL].accuracy:.1%}")
    Console(width=100).print(table)
    print("* the lowest loss")
