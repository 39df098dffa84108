"""One self-contained HTML page on an evaluation: the table, a plot of the scores, and a plot of each curve."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import pyplot
from matplotlib.figure import Figure

from modernenc.atomic import write_text
from modernenc.evaluation.cells import Curve, Measurement
from modernenc.reporting.plots import as_png
from modernenc.reporting.scores import beside, curves_of, notes_of, rows_of, table_of, tasks_of, unit_of, verdicts, with_mean


def write(path: Path, suite: str, results: Sequence[Measurement]) -> None:
    """Write the page."""
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a name may hold a dollar
    title, columns, lines = table_of(suite, results)
    values = {
        "suite": suite,
        "title": title,
        "columns": columns,
        "lines": lines,
        "remarks": [*beside(rows_of(results)), *verdicts(rows_of(results)), *notes_of(results)],
        "scores": as_png(_draw_scores(results, columns)),
        "curves": {title: as_png(_draw_curves(curves)) for title, curves in curves_of(results).items()},
        "cells": [
            [
                one.model,
                one.task,
                one.seed,
                ", ".join(f"{metric} {value:.4f}" for metric, value in one.scores.items()),
                f"{one.seconds:.0f}",
                ", ".join(f"{key} {value}" for key, value in one.setting.items()),
            ]
            for one in results
        ],
    }
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    write_text(path, environment.get_template("scores.html").render(values))


def _draw_scores(results: Sequence[Measurement], columns: Sequence[str]) -> Figure:
    """Plot each score with its interval: a row for each task, a mark for each model."""
    rows, unit = rows_of(results), unit_of(results)
    tasks = tasks_of(rows)
    figure, axis = pyplot.subplots(figsize=(9, 1.2 + 0.25 * len(columns) * (1 + len(rows))), layout="constrained")
    for number, row in enumerate(rows):
        estimates = with_mean(row, tasks)
        mine = [(at, estimates[column]) for at, column in enumerate(columns) if column in estimates]
        places = [at + (number + 0.5) / len(rows) * 0.8 - 0.4 for at, _ in mine]
        values, errors = [unit.scale * one.score for _, one in mine], [unit.scale * one.error for _, one in mine]
        axis.errorbar(values, places, xerr=errors, fmt="o", capsize=3, label=row.model)
    axis.set_yticks(range(len(columns)), columns)
    axis.set_ylim(len(columns) - 0.5, -0.5)
    axis.set_xlabel(unit.name)
    axis.grid(axis="x", color="#ddd")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_curves(curves: dict[str, Curve]) -> Figure:
    """Plot the curves of all models; lines where x is an order, which numbers show."""
    names = list(dict.fromkeys(x for curve in curves.values() for x in curve.x))
    ordered = all(name[:1].isdigit() for name in names) and len(names) > 1
    figure, axis = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    for number, (model, curve) in enumerate(curves.items()):
        shift = 0 if ordered else (number + 0.5) / len(curves) * 0.4 - 0.2
        places = [names.index(x) + shift for x in curve.x]
        axis.errorbar(places, curve.y, yerr=curve.error, fmt="o-" if ordered else "o", capsize=3, label=model)
    axis.set_xticks(range(len(names)), names, rotation=20 if len(names) > 6 else 0, ha="right" if len(names) > 6 else "center")
    axis.grid(axis="y", color="#ddd")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
