"""The results of an evaluation in the terminal and as JSON: the table of scores, what it can tell, and curves."""

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
from modernenc.evaluation.cells import Curve, Measurement
from modernenc.evaluation.intervals import ScoreEstimate, average, difference, estimate
from modernenc.evaluation.metrics import FRACTION, UNITS, Unit
from modernenc.evaluation.published import published_rows

MEAN = "mean"
WIDTH = 100


@dataclass(frozen=True)
class Row:
    """A model's estimates by task, each with the results of the setting that did best."""

    model: str
    estimates: dict[str, ScoreEstimate]
    best: dict[str, list[Measurement]]


def rows_of(results: Sequence[Measurement]) -> list[Row]:
    """Return a row for each model: of each task, the setting with the best mean over seeds."""
    rows = []
    for model in dict.fromkeys(result.model for result in results):
        best: dict[str, list[Measurement]] = {}
        mine = [result for result in results if result.model == model]
        for task in dict.fromkeys(result.task for result in mine):
            ordered = sorted((one for one in mine if one.task == task), key=lambda one: str(one.setting))
            by_setting = [list(group) for _, group in groupby(ordered, lambda one: one.setting)]
            best[task] = max(by_setting, key=lambda group: mean(_goodness(one) for one in group))
        estimates = {task: estimate(group[0].metrics, [one.found.predictions for one in group]) for task, group in best.items()}
        rows.append(Row(model, estimates, best))
    return rows


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """Return the tasks of all rows."""
    return list(dict.fromkeys(task for row in rows for task in row.estimates))


def with_mean(row: Row, tasks: Sequence[str]) -> dict[str, ScoreEstimate]:
    """Return the estimates of a row, and their mean if there are several tasks, all with fractions, and it has all of them."""
    results = [result for best in row.best.values() for result in best]
    whole = len(tasks) > 1 and all(task in row.estimates for task in tasks) and unit_of(results) == FRACTION
    return {**row.estimates, **({MEAN: average([row.estimates[task] for task in tasks])} if whole else {})}


def unit_of(results: Sequence[Measurement]) -> Unit:
    """Return the unit of the scores."""
    return UNITS.get(results[0].metrics[0], FRACTION)


def curves_of(results: Sequence[Measurement]) -> dict[str, dict[str, Curve]]:
    """Return the curves by title, then by model, of the first seed and setting."""
    titles = dict.fromkeys(
        (f"{one.task}: " if len({other.task for other in results}) > 1 else "", title)
        for one in results
        for title in one.found.curves
    )
    return {
        prefix + title: {
            model: next(one.found.curves[title] for one in results if one.model == model and _has(one, prefix, title))
            for model in dict.fromkeys(one.model for one in results if _has(one, prefix, title))
        }
        for prefix, title in titles
    }


def _has(result: Measurement, prefix: str, title: str) -> bool:
    return title in result.found.curves and prefix in ("", f"{result.task}: ")


def table_of(suite: str, results: Sequence[Measurement]) -> tuple[str, list[str], dict[str, list[str]]]:
    """Return the title, the columns and, by model, the cells of the table of a suite."""
    rows, unit = rows_of(results), unit_of(results)
    tasks = tasks_of(rows)
    columns = [*tasks, *([MEAN] if len(tasks) > 1 and unit == FRACTION else [])]
    lines = {row.model: [_cell(with_mean(row, tasks).get(column), unit) for column in columns] for row in rows}
    seeds = max(one.seeds for row in rows for one in row.estimates.values())
    over = f"{seeds} seeds and the {unit.over}" if seeds > 1 else f"the {unit.over}"
    return f"{suite}: {unit.name} ± half of the 95 % interval over {over}", columns, lines


def show(suite: str, results: Sequence[Measurement]) -> None:
    """Print the table of a suite, and what it can and cannot tell."""
    _print(*table_of(suite, results))
    for line in [*beside(rows_of(results)), *verdicts(rows_of(results)), *notes_of(results)]:
        Console(width=WIDTH, markup=False).print(line, highlight=False)


def show_published(suite: str, results: Sequence[Measurement]) -> None:
    """Print what others have published for the same tasks, with the sources."""
    tasks = tasks_of(rows_of(results))
    rows = published_rows(suite, tasks)
    if not rows:
        print(f"--published: nothing is on record of {suite} for {', '.join(tasks)}")
    for source, group in groupby(rows, lambda row: (row.source, row.note)):
        lines = {row.model: [f"{100 * row.scores[task]:.1f}" if task in row.scores else "-" for task in tasks] for row in group}
        _print(f"published: {source[0]} ({source[1]})", tasks, lines)


def show_curves(results: Sequence[Measurement]) -> None:
    """Print each curve as a table with a column for each model."""
    for title, curves in curves_of(results).items():
        points = [dict(zip(curve.x, zip(curve.y, curve.error, strict=True), strict=True)) for curve in curves.values()]
        places = dict.fromkeys(x for curve in curves.values() for x in curve.x)
        lines = {x: [f"{one[x][0]:.3f} ±{one[x][1]:.3f}" if x in one else "-" for one in points] for x in places}
        _print(title, list(curves), lines)


def beside(rows: Sequence[Row]) -> list[str]:
    """Return in words what was measured beside the scores, of each model by task."""
    lines = []
    for row in rows:
        for metric in dict.fromkeys(metric for best in row.best.values() for one in best for metric in one.also):
            values = [f"{task} {100 * mean(one.also[metric] for one in best):.1f}" for task, best in row.best.items()]
            lines.append(f"{metric} of {row.model}: {', '.join(values)}")
    return lines


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return in words which tasks tell the best model from the worst, and which do not, and how seeds vary."""
    lines = []
    apart, noise = [], []
    for task in tasks_of(rows) if len(rows) > 1 else ():
        having = sorted((row for row in rows if task in row.best), key=lambda row: mean(map(_goodness, row.best[task])))
        if len(having) < 2:
            continue
        last, first = having[0].best[task], having[-1].best[task]
        gap = difference(first[0].metrics, *([one.found.predictions for one in group] for group in (first, last)))
        (apart if abs(gap.score) > gap.error else noise).append(task)
    if apart:
        lines.append(f"tell the best model from the worst: {', '.join(apart)}")
    if noise:
        lines.append(f"cannot tell these models apart, the difference is within the noise: {', '.join(noise)}")
    deviations = {task: max(row.estimates[task].deviation for row in rows if task in row.estimates) for task in tasks_of(rows)}
    if any(deviations.values()):
        lines.append(
            "standard deviation over seeds: " + ", ".join(f"{task} {100 * value:.1f}" for task, value in deviations.items())
        )
    return lines


def notes_of(results: Sequence[Measurement]) -> list[str]:
    """Return what the user should know, each with the tasks and models that it is about."""
    about: dict[str, dict[str, None]] = {}
    for one in results:
        for note in one.found.notes:
            about.setdefault(note, {})[f"{one.task} of {one.model}"] = None
    return [f"{note}: {', '.join(of)}" for note, of in about.items()]


def write(path: Path, suite: str, results: Sequence[Measurement]) -> None:
    """Write what the tables show as JSON, with all digits and the settings."""
    content: list[dict[str, Any]] = [
        {
            "model": row.model,
            "task": task,
            **asdict(one),
            "error": one.error,
            "setting": row.best[task][0].setting,
            "scores": [result.scores for result in row.best[task]],
            "also": [result.also for result in row.best[task]],
            "notes": sorted({note for result in row.best[task] for note in result.found.notes}),
            "curves": {title: asdict(curve) for title, curve in row.best[task][0].found.curves.items()},
            "seconds": [result.seconds for result in row.best[task]],
        }
        for row in rows_of(results)
        for task, one in row.estimates.items()
    ]
    write_json(path, {"suite": suite, "rows": content})


def _print(title: str, columns: Sequence[str], lines: dict[str, list[str]]) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for name, cells in lines.items():
        table.add_row(name, *cells)
    Console(width=WIDTH, markup=False).print(title, table, sep="\n", highlight=False)


def _cell(one: ScoreEstimate | None, unit: Unit) -> str:
    if one is None:
        return "-"
    return f"{unit.scale * one.score:,.{unit.digits}f} ±{unit.scale * one.error:,.{unit.digits}f}"


def _goodness(result: Measurement) -> float:
    """Return a result's score as a number that is higher for a better one."""
    score = mean(result.scores[metric] for metric in result.metrics)
    return -score if unit_of([result]).lower_is_better else score
