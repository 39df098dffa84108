"""Plots of a run: its curriculum, losses, speed, tasks, rollbacks and branches."""

import math
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modernenc.config import Run
from modernenc.curriculum import CHOICES, MASKED_LM, Curriculum, reads_text
from modernenc.data.blocks import VALIDATION, Corpus
from modernenc.evaluation.standard_error import FIXED_RATIO
from modernenc.run_folder import lineage
from modernenc.run_folder.tables import ALL, Table

_PHASE_COLOURS = ("#dbe9f6", "#e5f2dd", "#fbe6d4", "#ece1f0", "#f7f3cf", "#d9f0ef")


def draw_curriculum(run: Run, curriculum: Curriculum) -> Figure:
    """Plot learning rate, batch, length, mask ratio and the attributes that phases set, over tokens seen."""
    tokens = sorted(
        {curriculum.total_tokens * step // 1000 for step in range(1000)}
        | {edge for stage in curriculum.stages for edge in (stage.first_tokens, stage.end_tokens - 1)}
    )
    specs = [curriculum.at(position) for position in tokens]
    specs = [spec for spec in specs if spec.objective == MASKED_LM or not reads_text(run.phases[spec.phase])]
    shares = {phase: curriculum.steps_by_objective(phase) for phase in run.phases}
    curves = {
        "learning rate": [spec.lr for spec in specs],
        "rows a step": [spec.batch_rows for spec in specs],
        "row length": [spec.seq_len for spec in specs],
        "mask ratio": [spec.mask_ratio for spec in specs],
        **{
            key: [spec.backbone.get(key, run.backbone.get(key)) for spec in specs]
            for key in sorted({key for spec in specs for key in spec.backbone})
        },
        **{
            f"fraction of {task}": [shares[spec.phase].get(task, 0) / sum(shares[spec.phase].values()) for spec in specs]
            for task in run.tasks
        },
    }
    figure, axes = pyplot.subplots(len(curves), 1, figsize=(9, 1.6 * len(curves)), sharex=True, constrained_layout=True)
    scale, unit = _token_scale(curriculum.total_tokens)
    for axis, (name, values) in zip(axes, curves.items(), strict=True):
        axis.plot([spec.tokens_seen / scale for spec in specs], values, color="#1f4e79")
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
        _shade(axis, curriculum, scale)
    axes[-1].set_xlabel(f"tokens seen ({unit})")
    return figure


def draw_loss(run: Run, curriculum: Curriculum, training: list[dict[str, str]], validation: list[dict[str, str]]) -> Figure:
    """Plot training and validation loss of masked LM over tokens seen, and the losses that rollbacks abandoned."""
    scale, unit = _token_scale(curriculum.total_tokens)
    figure, axis = pyplot.subplots(figsize=(9, 4), constrained_layout=True)
    positions = [int(row["tokens_seen"]) / scale for row in training]
    for number, abandoned in enumerate(_abandoned(Path(run.run_dir))):
        axis.plot([int(row["tokens_seen"]) / scale for row in abandoned], [float(row["loss"]) for row in abandoned], ":",
                  color="#c0504d", linewidth=1, label=None if number else "abandoned by a rollback")  # fmt: skip
    axis.plot(positions, [float(row["loss"]) for row in training], color="#9db8d2", linewidth=1, label="training")
    first = min((int(row["seq_len"]) for row in validation), default=0)
    lengths = sorted({int(row["seq_len"]) for row in validation})
    for length, colour in zip(lengths, ("#1f4e79", "#b3541e", "#3a7d44"), strict=False):
        rows = [row for row in validation if is_setting(row, ALL, length, FIXED_RATIO)]
        label = f"validation, rows of {length}, 15 %"
        style = "o-" if length == first else "s--"
        axis.plot([int(row["tokens_seen"]) / scale for row in rows], [float(row["loss"]) for row in rows], style,
                  color=colour, markersize=4, label=label)  # fmt: skip
    if validation:
        axis.axhline(unigram(run, validation), color="#888", linestyle=":", label="unigram frequencies")
    axis.set_xlabel(f"tokens seen ({unit})")
    axis.set_ylabel("nats per predicted token")
    _shade(axis, curriculum, scale)
    axis.legend(frameon=False)
    return figure


def draw_throughput(curriculum: Curriculum, training: list[dict[str, str]]) -> Figure:
    """Plot tokens a second without padding, over tokens seen."""
    scale, unit = _token_scale(curriculum.total_tokens)
    figure, axis = pyplot.subplots(figsize=(9, 2.4), constrained_layout=True)
    axis.plot([int(row["tokens_seen"]) / scale for row in training], [float(row["tokens_per_s"]) for row in training],
              color="#1f4e79", linewidth=1)  # fmt: skip
    axis.set_xlabel(f"tokens seen ({unit})")
    axis.set_ylabel("real tokens/s")
    axis.set_ylim(bottom=0)
    _shade(axis, curriculum, scale)
    return figure


def draw_task(curriculum: Curriculum, trained: list[dict[str, str]], validated: list[dict[str, str]]) -> Figure:
    """Plot loss and accuracy on a task's items, beside chance."""
    scale, unit = _token_scale(curriculum.total_tokens)
    figure, (loss, accuracy) = pyplot.subplots(2, 1, figsize=(9, 4), sharex=True, constrained_layout=True)
    loss.plot([int(row["tokens_seen"]) / scale for row in trained], [float(row["loss"]) for row in trained],
              ".", color="#9db8d2", markersize=3, label="training")  # fmt: skip
    for axis, key in ((loss, "loss"), (accuracy, "accuracy")):
        axis.plot([int(row["tokens_seen"]) / scale for row in validated], [float(row[key]) for row in validated], "o-",
                  color="#1f4e79", markersize=4, label="held-out items")  # fmt: skip
        axis.axhline(math.log(CHOICES) if axis is loss else 1 / CHOICES, color="#888", linestyle=":", label="chance")
        _shade(axis, curriculum, scale)
    loss.set_ylabel("nats per item")
    accuracy.set_ylabel("accuracy")
    accuracy.set_xlabel(f"tokens seen ({unit})")
    loss.legend(frameon=False)
    return figure


def draw_lineage(
    run_dir: Path, curriculum: Curriculum, training: list[dict[str, str]], entries: list[dict[str, Any]]
) -> Figure:
    """Plot the run as a line over tokens, with abandoned parts and branches as lines below it, the earliest nearest."""
    scale, unit = _token_scale(curriculum.total_tokens)
    reached = int(training[-1]["tokens_seen"]) if training else 0
    begin = next((entry["tokens_seen"] for entry in entries if entry["event"] == "branch"), 0)
    sides = []
    rollbacks = (entry for entry in entries if entry["event"] == "rollback")
    for entry, rows in zip(rollbacks, _abandoned(run_dir), strict=True):
        start = entry["tokens_seen"]
        end = int(rows[-1]["tokens_seen"]) if rows else start
        sides.append((start, end, f"abandoned: {entry['abandoned']}", "#c0504d"))
    for entry in entries:
        if entry["event"] == "branched":
            rows = Table(Path(entry["into"]) / "metrics.csv").read()
            end = int(rows[-1]["tokens_seen"] or 0) if rows else entry["tokens_seen"]
            sides.append((entry["tokens_seen"], end, f"branch: {Path(entry['into']).name}", "#3a7d44"))
    figure, axis = pyplot.subplots(figsize=(9, 0.9 + 0.4 * len(sides)), constrained_layout=True)
    if begin:
        axis.plot([0, begin / scale], [0, 0], color="#3a7d44", linestyle=":")
    axis.plot([begin / scale, reached / scale], [0, 0], color="#1f4e79", linewidth=2)
    for depth, (start, end, name, colour) in enumerate(sides, 1):
        axis.plot([start / scale, start / scale, end / scale], [0, -depth, -depth], color=colour, linewidth=1.5)
        axis.annotate(name, (end / scale, -depth), xytext=(4, -3), textcoords="offset points", fontsize=8, color=colour)
    axis.set_ylim(-len(sides) - 0.6, 0.6)
    axis.set_yticks([])
    axis.set_xlabel(f"tokens seen ({unit})")
    _shade(axis, curriculum, scale)
    return figure


def unigrams(run: Run) -> dict[str, float]:
    """Return the nats per held-out token of each source for a model that knows only the frequencies of tokens."""
    sources = Corpus.of(run.data).sources
    return {source: entry[VALIDATION]["unigram_nats"] for source, entry in sources.items()}


def unigram(run: Run, validation: list[dict[str, str]]) -> float:
    """Return the mean of `unigrams` over all sources, each with its weight in validation."""
    last = [row for row in validation if row["step"] == validation[-1]["step"]]
    targets = {row["source"]: int(row["targets"]) for row in last if row["source"] != ALL}
    nats = unigrams(run)
    return sum(nats[source] * count for source, count in targets.items()) / sum(targets.values())


def is_setting(row: dict[str, str], source: str, seq_len: int, ratio: float) -> bool:
    """Return whether a row of `validation.csv` is of this source, length and mask ratio."""
    return row["source"] == source and int(row["seq_len"]) == seq_len and float(row["mask_ratio"]) == ratio


def _abandoned(run_dir: Path) -> list[list[dict[str, str]]]:
    """Return the rows that each rollback abandoned."""
    rollbacks = [entry for entry in lineage.read(run_dir) if entry["event"] == "rollback"]
    return [
        [
            row
            for row in Table(run_dir / entry["abandoned"] / "metrics.csv").read()
            if int(row["tokens_seen"]) > entry["tokens_seen"] and row["objective"] == MASKED_LM
        ]
        for entry in rollbacks
    ]


def _shade(axis: Axes, curriculum: Curriculum, scale: float) -> None:
    for number, phase in enumerate(curriculum.phases):
        start, end = curriculum.start_of(phase) / scale, curriculum.end_of(phase) / scale
        axis.axvspan(start, end, color=_PHASE_COLOURS[number % len(_PHASE_COLOURS)], zorder=0)
        axis.annotate(phase, ((start + end) / 2, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    axis.margins(x=0)


def _token_scale(total: int) -> tuple[float, str]:
    return (1e9, "billions") if total > 3e9 else (1e6, "millions")
