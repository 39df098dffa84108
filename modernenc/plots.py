"""The pictures of a run: its curriculum, losses, speed, tasks, and where it went back or branched."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modernenc.config import Run
from modernenc.curriculum import CHOICES, MASKED_LM, Curriculum, reads_text
from modernenc.data.blocks import VALIDATION, Corpus
from modernenc.lineage import read as read_lineage
from modernenc.metrics import ALL, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PHASE_COLOURS = ("#dbe9f6", "#e5f2dd", "#fbe6d4", "#ece1f0", "#f7f3cf", "#d9f0ef")


def draw_curriculum(run: Run, curriculum: Curriculum) -> "Figure":
    """Learning rate, batch, length, mask ratio and what phases set of the backbone, over tokens seen."""
    from matplotlib import pyplot

    tokens = sorted(
        {curriculum.total_tokens * step // 1000 for step in range(1000)}
        | {edge for level in curriculum.levels for edge in (level.first_tokens, level.end_tokens - 1)}
    )
    points = [curriculum.at(position) for position in tokens]
    points = [point for point in points if point.objective == MASKED_LM or not reads_text(run.phases[point.phase])]
    shares = {phase: curriculum.steps_by_objective(phase) for phase in run.phases}
    curves = {
        "learning rate": [point.lr for point in points],
        "rows a step": [point.batch_rows for point in points],
        "row length": [point.seq_len for point in points],
        "mask ratio": [point.mask_ratio for point in points],
        **{
            key: [point.backbone.get(key, run.backbone.get(key)) for point in points]
            for key in sorted({key for point in points for key in point.backbone})
        },
        **{
            f"share of {task}": [shares[point.phase].get(task, 0) / sum(shares[point.phase].values()) for point in points]
            for task in run.tasks
        },
    }
    figure, axes = pyplot.subplots(len(curves), 1, figsize=(9, 1.6 * len(curves)), sharex=True, constrained_layout=True)
    scale, unit = _token_scale(curriculum.total_tokens)
    for axis, (name, values) in zip(axes, curves.items(), strict=True):
        axis.plot([point.tokens_seen / scale for point in points], values, color="#1f4e79")
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
        _shade(axis, curriculum, scale)
    axes[-1].set_xlabel(f"tokens seen ({unit})")
    return figure


def draw_loss(run: Run, curriculum: Curriculum, training: list[dict[str, str]], validation: list[dict[str, str]]) -> "Figure":
    """Training and validation loss of masked LM over tokens seen, and what rollbacks gave up."""
    from matplotlib import pyplot

    scale, unit = _token_scale(curriculum.total_tokens)
    figure, axis = pyplot.subplots(figsize=(9, 4), constrained_layout=True)
    positions = [int(row["tokens_seen"]) / scale for row in training]
    for number, given_up in enumerate(_given_up(Path(run.run_dir))):
        axis.plot([int(row["tokens_seen"]) / scale for row in given_up], [float(row["loss"]) for row in given_up], ":",
                  color="#c0504d", linewidth=1, label=None if number else "given up by a rollback")  # fmt: skip
    axis.plot(positions, [float(row["loss"]) for row in training], color="#9db8d2", linewidth=1, label="training")
    first = min((int(row["seq_len"]) for row in validation), default=0)
    lengths = sorted({int(row["seq_len"]) for row in validation})
    for length, colour in zip(lengths, ("#1f4e79", "#b3541e", "#3a7d44"), strict=False):
        rows = [row for row in validation if is_setting(row, ALL, length, 0.15)]
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


def draw_throughput(curriculum: Curriculum, training: list[dict[str, str]]) -> "Figure":
    """Tokens a second, padding left out, over tokens seen."""
    from matplotlib import pyplot

    scale, unit = _token_scale(curriculum.total_tokens)
    figure, axis = pyplot.subplots(figsize=(9, 2.4), constrained_layout=True)
    axis.plot([int(row["tokens_seen"]) / scale for row in training], [float(row["tokens_per_s"]) for row in training],
              color="#1f4e79", linewidth=1)  # fmt: skip
    axis.set_xlabel(f"tokens seen ({unit})")
    axis.set_ylabel("real tokens/s")
    axis.set_ylim(bottom=0)
    _shade(axis, curriculum, scale)
    return figure


def draw_task(curriculum: Curriculum, trained: list[dict[str, str]], validated: list[dict[str, str]]) -> "Figure":
    """Loss and accuracy on a task's items, beside chance."""
    from matplotlib import pyplot

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
) -> "Figure":
    """The run as a line over tokens, what it gave up and what branched off as lines below, the earliest nearest."""
    from matplotlib import pyplot

    scale, unit = _token_scale(curriculum.total_tokens)
    reached = int(training[-1]["tokens_seen"]) if training else 0
    begin = next((entry["tokens_seen"] for entry in entries if entry["event"] == "branch"), 0)
    sides = []
    rollbacks = (entry for entry in entries if entry["event"] == "rollback")
    for entry, rows in zip(rollbacks, _given_up(run_dir), strict=True):
        start = entry["tokens_seen"]
        end = int(rows[-1]["tokens_seen"]) if rows else start
        sides.append((start, end, f"given up: {entry['abandoned']}", "#c0504d"))
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
    """Nats per held-out token of each source, for one who knows the frequencies of tokens and nothing else."""
    sources = Corpus.of(run.data).sources
    return {source: entry[VALIDATION]["unigram_nats"] for source, entry in sources.items()}


def unigram(run: Run, validation: list[dict[str, str]]) -> float:
    """The same over all sources, each with the weight that it has in validation."""
    last = [row for row in validation if row["step"] == validation[-1]["step"]]
    targets = {row["source"]: int(row["targets"]) for row in last if row["source"] != ALL}
    nats = unigrams(run)
    return sum(nats[source] * count for source, count in targets.items()) / sum(targets.values())


def is_setting(row: dict[str, str], source: str, seq_len: int, ratio: float) -> bool:
    """Whether a row of `validation.csv` is of this source, length and mask ratio."""
    return row["source"] == source and int(row["seq_len"]) == seq_len and float(row["mask_ratio"]) == ratio


def _given_up(run_dir: Path) -> list[list[dict[str, str]]]:
    """What rollbacks gave up, from where they went back to."""
    rollbacks = [entry for entry in read_lineage(run_dir) if entry["event"] == "rollback"]
    return [
        [
            row
            for row in Table(run_dir / entry["abandoned"] / "metrics.csv").read()
            if int(row["tokens_seen"]) > entry["tokens_seen"] and row["objective"] == MASKED_LM
        ]
        for entry in rollbacks
    ]


def _shade(axis: "Axes", curriculum: Curriculum, scale: float) -> None:
    for number, phase in enumerate(curriculum.phases):
        start, end = curriculum.start_of(phase) / scale, curriculum.end_of(phase) / scale
        axis.axvspan(start, end, color=_PHASE_COLOURS[number % len(_PHASE_COLOURS)], zorder=0)
        axis.annotate(phase, ((start + end) / 2, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    axis.margins(x=0)


def _token_scale(total: int) -> tuple[float, str]:
    return (1e9, "billions") if total > 3e9 else (1e6, "millions")
