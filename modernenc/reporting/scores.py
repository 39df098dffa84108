"""The results of an evaluation as a table in the terminal, JSON, and a page with plots."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from modernenc.atomic import write_json
from modernenc.evaluation.cells import Result
from modernenc.evaluation.intervals import Estimate, average, difference, estimate

MEAN = "mean"


@dataclass(frozen=True)
class Row:
    """A model's estimates by task, each with the setting that did best."""

    model: str
    estimates: dict[str, Estimate]
    best: dict[str, list[Result]]


def rows_of(results: Sequence[Result]) -> list[Row]:
    """Return a row for each model: of each task, the setting with the highest mean over seeds."""
    rows = []
    for model in dict.fromkeys(result.model for result in results):
        best: dict[str, list[Result]] = {}
        mine = [result for result in results if result.model == model]
        for task in dict.fromkeys(result.task for result in mine):
            ordered = sorted((one for one in mine if one.task == task), key=lambda one: str(one.setting))
            by_setting = [list(group) for _, group in groupby(ordered, lambda one: one.setting)]
            best[task] = max(by_setting, key=lambda group: mean(mean(one.scores.values()) for one in group))
        estimates = {task: estimate(group[0].metrics, [one.found.predictions for one in group]) for task, group in best.items()}
        rows.append(Row(model, estimates, best))
    return rows


def mean_of(row: Row, tasks: Sequence[str]) -> Estimate | None:
    """Return the mean over tasks, or None for a model that lacks one of them."""
    return average([row.estimates[task] for task in tasks]) if all(task in row.estimates for task in tasks) else None


def show(title: str, results: Sequence[Result]) -> None:
    """Print the table of a suite, and what it can and cannot tell."""
    rows = rows_of(results)
    tasks = list(dict.fromkeys(task for row in rows for task in row.estimates))
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in (*tasks, *([MEAN] if len(tasks) > 1 else [])):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        cells = [_cell(row.estimates.get(task)) for task in tasks]
        table.add_row(row.model, *cells, *([_cell(mean_of(row, tasks))] if len(tasks) > 1 else []))
    seeds = min(one.seeds for row in rows for one in row.estimates.values())
    console = Console(width=100)
    console.print(table)
    over = f"{seeds} seeds and over the held-out items" if seeds > 1 else "the held-out items; one seed says nothing of others"
    console.print(f"score x 100, and half of its 95 % interval over {over}", highlight=False)
    for line in _verdicts(rows, tasks):
        console.print(line, highlight=False)


def _cell(one: Estimate | None) -> str:
    return f"{100 * one.score:.1f} ±{100 * one.error:.1f}" if one else "-"


def _verdicts(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    """Say which tasks tell the models apart, and which do not."""
    if len(rows) < 2:
        return []
    apart, noise = [], []
    for task in tasks:
        having = sorted((row for row in rows if task in row.best), key=lambda row: -row.estimates[task].score)
        if len(having) > 1:
            first, last = having[0].best[task], having[-1].best[task]
            gap = difference(
                first[0].metrics, [one.found.predictions for one in first], [one.found.predictions for one in last]
            )
            (apart if gap.score > gap.error else noise).append(task)
    return [
        f"{words}: {', '.join(names)}"
        for words, names in (("tells the best model from the worst", apart), ("no difference beyond the noise", noise))
        if names
    ]


def write(path: Path, suite: str, results: Sequence[Result]) -> None:
    """Write what the table shows, and more digits, as JSON."""
    rows = rows_of(results)
    content: list[dict[str, Any]] = [
        {
            "model": row.model,
            "task": task,
            **asdict(one),
            "setting": row.best[task][0].setting,
            "scores": [result.scores for result in row.best[task]],
            "notes": sorted({note for result in row.best[task] for note in result.found.notes}),
            "seconds": [result.seconds for result in row.best[task]],
        }
        for row in rows
        for task, one in row.estimates.items()
    ]
    write_json(path, {"suite": suite, "rows": content})
