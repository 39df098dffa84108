"""Validation of several models, and of averages of checkpoints, on the same held-out rows."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from modernenc.config import Run
from modernenc.data.blocks import TOKENIZER, Corpus
from modernenc.data.tokenizer import check_same_ids
from modernenc.evaluation.validation import Score, Validator
from modernenc.model.load import load_folder, masked_lm_of, small_corpus
from modernenc.objectives.masked_lm import MaskedLM
from modernenc.run_folder.averaging import average
from modernenc.run_folder.checkpoints import Checkpoint, read
from modernenc.run_folder.load import check_root, locate, without_cache
from modernenc.run_folder.tables import ALL
from modernenc.saved_config import apply_overrides

Compared = dict[str, tuple[int | None, dict[str, Score]]]
"""Tokens seen, and scores by source, of each checkpoint or average by name; of a Hugging Face folder no tokens are known."""


def compare(paths: list[Path], averages: list[str], across_runs: bool = False, overrides: Sequence[str] = ()) -> Compared:
    """Validate checkpoints, the given kinds of their average, and Hugging Face folders.

    `overrides` may be `data.root=` and `data.cache=`, where the held-out text is now. Raises ValueError if no path is of a run,
    or if they have different tokenizers; other errors are those of reading checkpoints and folders.
    """
    checkpoints: dict[str, tuple[Run, Path]] = {}
    folders = [path for path in paths if (path / "config.json").is_file()]
    if len(folders) == len(paths):
        raise ValueError(f"{paths[0]}: expected a run folder or a checkpoint too, on whose held-out text models are compared")
    for path in (path for path in paths if path not in folders):
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

    def by_source(model: MaskedLM) -> dict[str, Score]:
        return {score.source: score for score in validator.scores_at_reference(model)}

    def validate(checkpoint: Checkpoint, path: Path) -> tuple[int, dict[str, Score]]:
        return checkpoint.state.tokens_seen, by_source(masked_lm_of(checkpoint, path))

    def validate_folder(folder: Path) -> dict[str, Score]:
        model = load_folder(folder)
        if (folder / TOKENIZER).is_file():
            check_same_ids(folder / TOKENIZER, corpus.tokenizer_file, str(folder))
        return by_source(model)

    compared: Compared = {str(folder): (None, validate_folder(folder)) for folder in folders}
    compared |= {name: validate(read(path), path) for name, (_, path) in checkpoints.items()}
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
        table.add_row(name + mark, "" if tokens is None else f"{tokens:,}", *losses, f"{scores[ALL].accuracy:.1%}")
    Console(width=100).print(table)
    print("* the lowest loss")
