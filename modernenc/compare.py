"""Validation of checkpoints side by side: `python -m modernenc.compare CKPT|RUN_DIR ... [--average KIND]`.

All are validated on the same held-out rows with the same masks: those of the first one's run, at its first phase's length and
15 %. With `--average`, also their average. Branches of a run compare by their folders.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modernenc.averaging import KINDS
from modernenc.cli import one_line_errors
from modernenc.config import Run

if TYPE_CHECKING:
    from modernenc.validation import Score

_WIDTH = 100


def main() -> None:
    """Compare what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m modernenc.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="+", help="checkpoints, or run folders (their newest is taken)")
    parser.add_argument("--average", choices=sorted(KINDS), action="append", default=[], help="also validate their average")
    arguments = parser.parse_args()
    with one_line_errors():
        show(compare(arguments.paths, arguments.average))


def compare(paths: list[Path], averages: list[str]) -> dict[str, tuple[int, dict[str, "Score"]]]:
    """Tokens seen, and scores by source, of each checkpoint and average; the errors are those of reading checkpoints."""
    from modernenc.averaging import average
    from modernenc.checkpoints import read
    from modernenc.curriculum import Curriculum
    from modernenc.data.blocks import Corpus
    from modernenc.model import locate, masked_lm_of
    from modernenc.validation import Score, Validator

    found: dict[str, tuple[Run, Path]] = {}
    for path in paths:
        run, checkpoint = locate(path)
        if checkpoint is None:
            raise FileNotFoundError(f"{path} holds no checkpoint yet")
        name = checkpoint.stem if path.suffix == ".ckpt" else path.name
        found[str(path) if name in found else name] = run, checkpoint
    first = next(iter(found.values()))[0]
    validator = Validator(first, Curriculum.of(first), Corpus.of(first.data))

    def scores(run: Run, content: dict[str, Any]) -> tuple[int, dict[str, Score]]:
        objective = masked_lm_of(run, content)
        return content["state"]["tokens_seen"], {score.source: score for score in validator.first_scores(objective)}

    compared = {name: scores(run, read(checkpoint)) for name, (run, checkpoint) in found.items()}
    every = [checkpoint for _, checkpoint in found.values()]
    return compared | {f"average: {kind}": scores(first, average(every, kind)) for kind in averages}


def show(compared: dict[str, tuple[int, dict[str, "Score"]]]) -> None:
    """Print a table, the lowest loss marked."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from modernenc.metrics import ALL

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
    print("* the lowest")


if __name__ == "__main__":
    main()
