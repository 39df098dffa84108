"""Plots of a run over the tokens that it has seen: its curriculum, losses, speed, tasks, rollbacks and branches."""

import base64
import io
import math
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modernenc.config import Run
from modernenc.curriculum import CAUSAL_LM, CHOICES, MASKED_LM, OF_TEXT, Curriculum, reads_text
from modernenc.run_folder import lineage
from modernenc.run_folder.tables import ALL, FIXED_RATIO, Table

Rows = list[dict[str, str]]
"""Rows of `metrics.csv` or `validation.csv`: text by the name of the column."""

_BLUE, _PALE_BLUE, _ORANGE, _RED, _GREEN, _PALE_GREEN, _GREY = (
    "#1f4e79", "#9db8d2", "#b3541e", "#c0504d", "#3a7d44", "#a3c9a8", "#888",
)  # fmt: skip
_PHASE_COLOURS = ("#dbe9f6", "#e5f2dd", "#fbe6d4", "#ece1f0", "#f7f3cf", "#d9f0ef")


def as_png(figure: Figure) -> str:
    """Return a figure as a PNG in base64, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def rows_of(validation: Rows, seq_len: int, ratio: float, source: str = "") -> Rows:
    """Return the rows of `validation.csv` of a row length and mask ratio, and of one source if it is named."""
    return [
        row for row in validation
        if int(row["seq_len"]) == seq_len and float(row["mask_ratio"]) == ratio and source in ("", row["source"])
    ]  # fmt: skip


def draw_curriculum(run: Run, curriculum: Curriculum) -> Figure:
    """Plot learning rate, batch, row length, mask ratio, attributes that phases set, and the fraction of each task."""
    tokens = sorted(
        {curriculum.total_tokens * step // 1000 for step in range(1000)}
        | {edge for stage in curriculum.stages for edge in (stage.first_tokens, stage.end_tokens - 1)}
    )
    specs = [curriculum.at(position) for position in tokens]
    specs = [spec for spec in specs if spec.objective in OF_TEXT or not reads_text(run.phases[spec.phase])]
    steps = {phase: curriculum.steps_by_objective(phase) for phase in run.phases}
    curves = {
        "learning rate": [spec.lr for spec in specs],
        "rows a step": [spec.batch_rows for spec in specs],
        "row length": [spec.seq_len for spec in specs],
        "mask ratio": [spec.mask_ratio for spec in specs],
    }
    for key in sorted({key for spec in specs for key in spec.backbone}):
        curves[key] = [spec.backbone.get(key, run.backbone.get(key)) for spec in specs]
    if any(phase.causal_share for phase in run.phases.values()):
        curves["causal"] = [float(spec.objective == CAUSAL_LM) for spec in specs]
    for task in run.tasks:
        curves[f"fraction of {task}"] = [steps[spec.phase].get(task, 0) / sum(steps[spec.phase].values()) for spec in specs]
    figure, axes, scale = _new_figure(curriculum, 1.6 * len(curves), len(curves))
    for axis, (name, values) in zip(axes, curves.items(), strict=True):
        axis.plot([spec.tokens_seen / scale for spec in specs], values, color=_BLUE)
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
    return figure


def draw_loss(run: Run, curriculum: Curriculum, metrics: Rows, validation: Rows, unigram: float | None) -> Figure:
    """Plot training and validation loss on text, the losses that rollbacks abandoned, and that of unigram frequencies."""
    figure, (axis,), scale = _new_figure(curriculum, 4)
    for number, (_, rows) in enumerate(_abandoned_rows(Path(run.run_dir))):
        label = None if number else "abandoned by a rollback"
        _plot(axis, rows, "loss", scale, ":", color=_RED, linewidth=1, label=label)
    masked, causal = ([row for row in metrics if row["objective"] == name] for name in OF_TEXT)
    _plot(axis, masked, "loss", scale, color=_PALE_BLUE, linewidth=1, label="training")
    if causal:
        _plot(axis, causal, "loss", scale, color=_PALE_GREEN, linewidth=1, label="training, causal")
    lengths = sorted({int(row["seq_len"]) for row in validation})
    for length, style, colour in zip(lengths, ("o-", "s--", "s--"), (_BLUE, _ORANGE, _GREEN), strict=False):
        rows = rows_of(validation, length, FIXED_RATIO, ALL)
        _plot(axis, rows, "loss", scale, style, color=colour, markersize=4, label=f"validation, rows of {length}, 15 %")
    if unigram is not None:
        axis.axhline(unigram, color=_GREY, linestyle=":", label="unigram frequencies")
    axis.set_ylabel("nats per predicted token")
    axis.legend(frameon=False)
    return figure


def draw_throughput(curriculum: Curriculum, training: Rows) -> Figure:
    """Plot tokens a second, without padding."""
    figure, (axis,), scale = _new_figure(curriculum, 2.4)
    _plot(axis, training, "tokens_per_s", scale, color=_BLUE, linewidth=1)
    axis.set_ylabel("real tokens/s")
    axis.set_ylim(bottom=0)
    return figure


def draw_task(curriculum: Curriculum, trained: Rows, validated: Rows) -> Figure:
    """Plot loss and accuracy on a task's items, beside chance."""
    figure, (loss, accuracy), scale = _new_figure(curriculum, 4, 2)
    _plot(loss, trained, "loss", scale, ".", color=_PALE_BLUE, markersize=3, label="training")
    for axis, key, chance in ((loss, "loss", math.log(CHOICES)), (accuracy, "accuracy", 1 / CHOICES)):
        _plot(axis, validated, key, scale, "o-", color=_BLUE, markersize=4, label="held-out items")
        axis.axhline(chance, color=_GREY, linestyle=":", label="chance")
    loss.set_ylabel("nats per item")
    accuracy.set_ylabel("accuracy")
    loss.legend(frameon=False)
    return figure


def draw_evaluations(curriculum: Curriculum, rows: Rows) -> Figure:
    """Plot the scores of checkpoints, with their intervals: a panel for each suite, a line for each task."""
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    figure, axes, scale = _new_figure(curriculum, 0.8 + 2.6 * len(suites), len(suites))
    for axis, suite in zip(axes, suites, strict=True):
        for task in dict.fromkeys(row["task"] for row in rows if row["suite"] == suite):
            mine = [row for row in rows if (row["suite"], row["task"]) == (suite, task)]
            places = [int(row["tokens_seen"]) / scale for row in mine]
            scores, errors = ([float(row[key]) for row in mine] for key in ("score", "error"))
            axis.errorbar(places, scores, yerr=errors, fmt="o-", markersize=4, capsize=2, label=task)
        axis.set_ylabel(suite)
        axis.legend(frameon=False)
    return figure


def draw_lineage(run_dir: Path, curriculum: Curriculum, training: Rows, entries: list[dict[str, Any]]) -> Figure:
    """Plot the run as a line over tokens, with abandoned parts as lines below it, in the order of time, then branches.

    Of a branch only its beginning is drawn: the folder that the history names may be anybody's, and is not read.
    """
    sides = [(entry, f"abandoned: {entry['abandoned']}", _RED, rows) for entry, rows in _abandoned_rows(run_dir)]
    for entry in entries:
        if entry["event"] == "branched":
            sides.append((entry, f"branch: {Path(entry['into']).name}", _GREEN, []))
    figure, (axis,), scale = _new_figure(curriculum, 0.9 + 0.4 * len(sides))
    begin = next((entry["tokens_seen"] for entry in entries if entry["event"] == "branch"), 0) / scale
    if begin:
        axis.plot([0, begin], [0, 0], color=_GREEN, linestyle=":")
    axis.plot([begin, int(training[-1]["tokens_seen"]) / scale if training else 0], [0, 0], color=_BLUE, linewidth=2)
    for depth, (entry, name, colour, rows) in enumerate(sides, 1):
        start, end = entry["tokens_seen"] / scale, int(rows[-1]["tokens_seen"] if rows else entry["tokens_seen"]) / scale
        axis.plot([start, start, end], [0, -depth, -depth], color=colour, linewidth=1.5)
        axis.annotate(name, (end, -depth), xytext=(4, -3), textcoords="offset points", fontsize=8, color=colour)
    axis.set_ylim(-len(sides) - 0.6, 0.6)
    axis.set_yticks([])
    return figure


def _abandoned_rows(run_dir: Path) -> list[tuple[dict[str, Any], Rows]]:
    """Return the entry of each rollback, and the rows of masked LM that it abandoned."""
    found = []
    for entry in lineage.read(run_dir):
        if entry["event"] == "rollback":
            rows = [row for row in Table(run_dir / entry["abandoned"] / "metrics.csv").read() if row["objective"] == MASKED_LM]
            found.append((entry, [row for row in rows if int(row["tokens_seen"]) > entry["tokens_seen"]]))
    return found


def _new_figure(curriculum: Curriculum, height: float, panels: int = 1) -> tuple[Figure, list[Axes], float]:
    """Return a figure whose panels share an axis of tokens seen and shade the phases, and the tokens of a unit of that axis."""
    figure, axes = pyplot.subplots(panels, 1, figsize=(9, height), sharex=True, squeeze=False, constrained_layout=True)
    scale, unit = (1e9, "billions") if curriculum.total_tokens > 3e9 else (1e6, "millions")
    for axis in axes.flat:
        for number, phase in enumerate(curriculum.phases):
            start, end = curriculum.start_of(phase) / scale, curriculum.end_of(phase) / scale
            axis.axvspan(start, end, color=_PHASE_COLOURS[number % len(_PHASE_COLOURS)], zorder=0)
            middle = ((start + end) / 2, 1)
            axis.annotate(phase, middle, xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
        axis.margins(x=0)
    axes[-1, 0].set_xlabel(f"tokens seen ({unit})")
    return figure, list(axes.flat), scale


def _plot(axis: Axes, rows: Rows, column: str, scale: float, style: str = "-", **options: Any) -> None:
    """Plot a column of a table over the tokens seen."""
    axis.plot([int(row["tokens_seen"]) / scale for row in rows], [float(row[column]) for row in rows], style, **options)
