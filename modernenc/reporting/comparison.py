"""Validation of several checkpoints, and of their averages, on the same held-out rows."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from modernenc.config import Run
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.evaluation.validation import Score, Validator
from modernenc.model.load import masked_lm_of
from modernenc.run_folder.averaging import average
from modernenc.run_folder.checkpoints import Checkpoint, read
from modernenc.run_folder.load import locate
from modernenc.run_folder.tables import ALL

_WIDTH = 100

Compared = dict[str, tuple[int, dict[str, Score]]]
"""Tokens seen, and scores by source, of each checkpoint or average by name."""


def compare(paths: list[Path], averages: list[str], across_runs: bool = False) -> Compared:
    """Validate checkpoints and the given kinds of their average; errors are those of reading checkpoints."""
    found: dict[str, tuple[Run, Path]] = {}
    for path in paths:
        run, checkpoint = locate(path)
        if checkpoint is None:
            raise FileNotFoundError(f"{path} holds no checkpoint yet")
        name = checkpoint.stem if path.suffix == ".ckpt" else path.name
        found[str(path) if name in found else name] = run, checkpoint
    first = next(iter(found.values()))[0]
    validator = Validator(first, Curriculum.of(first), Corpus.of(first.data))

    def scores(run: Run, checkpoint: Checkpoint) -> tuple[int, dict[str, Score]]:
        model = masked_lm_of(run, checkpoint)
        return checkpoint.state.tokens_seen, {score.source: score for score in validator.scores_at_reference(model)}

    compared = {name: scores(run, read(checkpoint)) for name, (run, checkpoint) in found.items()}
    every = [checkpoint for _, checkpoint in found.values()]
    return compared | {f"average: {kind}": scores(first, average(every, kind, across_runs)) for kind in averages}


def show(compared: Compared) -> None:
    """Print a table with the lowest loss marked."""
    sources = list(next(iter(compared.values()))[1])
    best = min(scores[ALL].loss for _, scores in compared.values())
    table = Table(title="validation, 15 % predicted: nats per token", title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "at token", *sources, "accuracy"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for name, (tokens, scores) in compared.items():
        losses = [f"{scores[source].loss:.3f}" for source in sources]
        marked = "*" if scores[ALL].loss == best else ""
        table.add_row(name + marked, f"{tokens:,}", *losses, f"{scores[ALL].accuracy:.1%}")
    Console(width=_WIDTH).print(table)
    print("* the lowest loss")
