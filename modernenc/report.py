"""One self-contained page on a run: `python -m modernenc.report RUN_DIR` writes `report.html` and `curriculum.png`."""

import argparse
import base64
import html
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modernenc.cli import one_line_errors
from modernenc.config import CONFIG, Run, load
from modernenc.curriculum import CHOICES, MASKED_LM, Curriculum, reads_text
from modernenc.data.blocks import VALIDATION, Corpus
from modernenc.lineage import read as read_lineage
from modernenc.metrics import ALL, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PHASE_COLOURS = ("#dbe9f6", "#e5f2dd", "#fbe6d4", "#ece1f0", "#f7f3cf", "#d9f0ef")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } img { max-width: 100% }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
mark { background: #fff2a8 } .wrong { background: #ffd9d3 } .facts b { font-size: 1.3em } .facts td { text-align: left }
"""


def main() -> None:
    """Write the report of the run on the command line."""
    parser = argparse.ArgumentParser(prog="python -m modernenc.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run folder")
    run_dir = parser.parse_args().run_dir
    with one_line_errors():
        run = load(run_dir)
        run.run_dir = str(run_dir)
        print(write(run))


def write(run: Run) -> Path:
    """Write the report from what the run folder holds so far, and the curriculum's picture; the report's path."""
    import matplotlib

    matplotlib.use("Agg")
    run_dir = Path(run.run_dir)
    curriculum = Curriculum.of(run)
    metrics, scores = Table(run_dir / "metrics.csv").read(), Table(run_dir / "validation.csv").read()
    training = [row for row in metrics if row["objective"] == MASKED_LM]
    validation = [row for row in scores if row["source"] not in run.tasks]
    picture = draw_curriculum(run, curriculum)
    picture.savefig(run_dir / "curriculum.png", dpi=110)
    sections = [
        f"<h1>{html.escape(run.recipe)}</h1>",
        _facts(run, curriculum, training, validation),
        "<h2>Loss</h2>", _image(_draw_loss(run, curriculum, training, validation)),
        "<h2>Validation</h2>", _validation_table(run, validation),
        *(_task(run, curriculum, task, metrics, scores) for task in run.tasks),
        "<h2>Curriculum</h2>", _image(picture),
        "<h2>Throughput</h2>", _image(_draw_throughput(curriculum, metrics)),
        "<h2>Tokens</h2>", _account(run_dir),
        "<h2>Fill-mask on held-out text</h2>", _samples(run, run_dir),
        "<h2>Lineage</h2>", _lineage(run_dir, curriculum, training),
        "<h2>Configuration</h2>", _preformatted((run_dir / CONFIG).read_text()),
    ]  # fmt: skip
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(run.recipe)}</title><style>{_STYLE}</style>"
    path = run_dir / "report.html"
    path.write_text(page + "\n".join(sections))
    return path


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


def _draw_loss(run: Run, curriculum: Curriculum, training: list[dict[str, str]], validation: list[dict[str, str]]) -> "Figure":
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
        rows = [row for row in validation if _is(row, ALL, length, 0.15)]
        label = f"validation, rows of {length}, 15 %"
        style = "o-" if length == first else "s--"
        axis.plot([int(row["tokens_seen"]) / scale for row in rows], [float(row["loss"]) for row in rows], style,
                  color=colour, markersize=4, label=label)  # fmt: skip
    if validation:
        axis.axhline(_unigram(run, validation), color="#888", linestyle=":", label="unigram frequencies")
    axis.set_xlabel(f"tokens seen ({unit})")
    axis.set_ylabel("nats per predicted token")
    _shade(axis, curriculum, scale)
    axis.legend(frameon=False)
    return figure


def _unigrams(run: Run) -> dict[str, float]:
    """Nats per held-out token of each source, for one who knows the frequencies of tokens and nothing else."""
    sources = Corpus.of(run.data).sources
    return {source: entry[VALIDATION]["unigram_nats"] for source, entry in sources.items()}


def _unigram(run: Run, validation: list[dict[str, str]]) -> float:
    """The same over all sources, each with the weight that it has in validation."""
    last = [row for row in validation if row["step"] == validation[-1]["step"]]
    targets = {row["source"]: int(row["targets"]) for row in last if row["source"] != ALL}
    unigrams = _unigrams(run)
    return sum(unigrams[source] * count for source, count in targets.items()) / sum(targets.values())


def _draw_throughput(curriculum: Curriculum, training: list[dict[str, str]]) -> "Figure":
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


def _shade(axis: "Axes", curriculum: Curriculum, scale: float) -> None:
    for number, phase in enumerate(curriculum.phases):
        start, end = curriculum.start_of(phase) / scale, curriculum.end_of(phase) / scale
        axis.axvspan(start, end, color=_PHASE_COLOURS[number % len(_PHASE_COLOURS)], zorder=0)
        axis.annotate(phase, ((start + end) / 2, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    axis.margins(x=0)


def _facts(run: Run, curriculum: Curriculum, training: list[dict[str, str]], validation: list[dict[str, str]]) -> str:
    if not training:
        return "<p>No step of masked LM was recorded yet.</p>"
    last = training[-1]
    cells = [
        ("tokens seen", f"{int(last['tokens_seen']):,} of {curriculum.total_tokens:,}"),
        ("training time", f"{float(last['seconds']) / 60:.1f} min"),
        ("training loss", f"{float(last['loss']):.3f} nats"),
    ]
    first = next(iter(run.phases.values())).seq_len
    finals = [row for row in validation if _is(row, ALL, first, 0.15)]
    if finals:
        cells.append((f"validation loss, rows of {first}, 15 %", f"{float(finals[-1]['loss']):.3f} nats"))
    head = "".join(f"<td>{name}<br><b>{value}</b></td>" for name, value in cells)
    return f"<table class=facts><tr>{head}</tr></table>"


def _validation_table(run: Run, validation: list[dict[str, str]]) -> str:
    """Loss per source at the last step of each phase, beside the unigram baseline."""
    if not validation:
        return "<p>No validation yet.</p>"
    unigrams = {**_unigrams(run), ALL: _unigram(run, validation)}
    settings = sorted({(int(row["seq_len"]), float(row["mask_ratio"])) for row in validation})
    tables = []
    for seq_len, ratio in settings:
        rows = [row for row in validation if int(row["seq_len"]) == seq_len and float(row["mask_ratio"]) == ratio]
        ends = {row["phase"]: row["step"] for row in rows}
        head = "".join(f"<th>end of {html.escape(phase)}</th>" for phase in ends)
        lines = []
        for source in dict.fromkeys(row["source"] for row in rows):
            at_end = {row["phase"]: row for row in rows if row["source"] == source and ends[row["phase"]] == row["step"]}
            values = "".join(f"<td>{float(row['loss']):.3f}</td>" for row in at_end.values())
            accuracy = f"<td>{float(list(at_end.values())[-1]['accuracy']):.1%}</td>"
            lines.append(f"<tr><td>{html.escape(source)}</td><td>{unigrams[source]:.3f}</td>{values}{accuracy}</tr>")
        title = f"<h3>Rows of {seq_len}, {ratio:.0%} predicted (nats per token)</h3>"
        header = f"<tr><th>source</th><th>unigram</th>{head}<th>accuracy now</th></tr>"
        tables.append(f"{title}<table>{header}{''.join(lines)}</table>")
    return "".join(tables)


def _task(run: Run, curriculum: Curriculum, task: str, metrics: list[dict[str, str]], scores: list[dict[str, str]]) -> str:
    """Accuracy on a task's held-out items, as a curve and at the end of each phase."""
    from matplotlib import pyplot

    scale, unit = _token_scale(curriculum.total_tokens)
    validated = [row for row in scores if row["source"] == task]
    trained = [row for row in metrics if row["objective"] == task]
    if not validated:
        return ""
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
    ends = {row["phase"]: row for row in validated}
    head = "".join(f"<th>end of {html.escape(phase)}</th>" for phase in ends)
    cells = "".join(f"<td>{float(row['accuracy']):.1%}</td>" for row in ends.values())
    table = f"<table><tr><th>items</th>{head}</tr><tr><td>{int(validated[-1]['targets']):,}</td>{cells}</tr></table>"
    return f"<h2>{html.escape(task)}: which of {CHOICES} endings</h2>{_image(figure)}{table}"


def _account(run_dir: Path) -> str:
    """Where the tokens of each phase went, up to the newest checkpoint."""
    from modernenc.checkpoints import newest, read

    checkpoint = newest(run_dir)
    if checkpoint is None:
        return "<p>No checkpoint yet.</p>"
    accounts = read(checkpoint)["state"]["data"]["accounts"]
    lines = []
    for phase, account in accounts.items():
        served, drawn = sum(account["served"].values()), sum(account["drawn"].values())
        capacity = served + account["special"] + account["padding"]
        shares = ", ".join(
            f"{name.partition('/')[0]} {tokens / served:.1%}" for name, tokens in sorted(account["served"].items())
        )
        numbers = (
            served,
            account["special"],
            account["padding"],
            drawn - served - account["skipped"],
            account["skipped"],
            account["cuts"],
        )
        cells = "".join(f"<td>{number:,}</td>" for number in numbers)
        lines.append(f"<tr><td>{html.escape(phase)}</td>{cells}<td>{1 - account['padding'] / capacity:.2%}</td>"
                     f"<td>{html.escape(shares)}</td></tr>")  # fmt: skip
    head = "".join(
        f"<th>{name}</th>"
        for name in ("phase", "text", "cls, sep", "padding", "left in windows", "skipped", "cuts", "fill", "served")
    )
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


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


def _lineage(run_dir: Path, curriculum: Curriculum, training: list[dict[str, str]]) -> str:
    """Where the run came from, as a table; with a picture when it is not one line."""
    entries = read_lineage(run_dir)
    lines = []
    for entry in entries:
        notes = [*entry.get("changed", [])]
        if entry.get("skipped_tokens"):
            notes.append(f"skipped {entry['skipped_tokens']:,} tokens of data")
        notes += [f"{word} {entry[key]}" for key, word in (("abandoned", "gave up"), ("into", "into")) if key in entry]
        cells = (
            entry["time"],
            entry["event"],
            entry["checkpoint"],
            f"{entry['tokens_seen']:,}",
            str(entry["ranks"]),
            "; ".join(notes),
        )
        lines.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{name}</th>" for name in ("time", "event", "checkpoint", "at token", "ranks", ""))
    table = f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    forks = {"rollback", "branch", "branched"} & {entry["event"] for entry in entries}
    return (_image(_draw_lineage(run_dir, curriculum, training, entries)) if forks else "") + table


def _draw_lineage(
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


def _samples(run: Run, run_dir: Path) -> str:
    """One held-out passage per source with a few masked words: what the newest checkpoint says, and what stood there."""
    import torch
    from tokenizers import Tokenizer

    from modernenc.model import load_masked_lm, locate

    _, checkpoint = locate(run_dir)
    if checkpoint is None:
        return "<p>No checkpoint yet.</p>"
    corpus = Corpus.of(run.data)
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    objective = load_masked_lm(run, checkpoint)
    parts = []
    for source in corpus.sources:
        text = corpus.open(f"{source}/{VALIDATION}").read(0, 0).tokens[:80].astype("int64")
        ids = torch.cat([torch.tensor([corpus.roles.cls]), torch.from_numpy(text), torch.tensor([corpus.roles.sep])])
        places = torch.arange(8, len(ids) - 1, 12)
        truth = ids[places].clone()
        ids[places] = corpus.roles.mask
        with torch.no_grad():
            logits = objective.logits(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids), places)
        best = logits.softmax(-1).topk(3)
        pieces, start = [], 1
        for place, answer, chances, guesses in zip(places.tolist(), truth.tolist(), *best, strict=True):
            pieces.append(html.escape(tokenizer.decode(ids[start:place].tolist())))
            hint = ", ".join(
                f"{tokenizer.decode([g])!r} {p:.0%}" for g, p in zip(guesses.tolist(), chances.tolist(), strict=True)
            )
            kind = "" if guesses[0] == answer else " class=wrong"
            shown = html.escape(tokenizer.decode([int(guesses[0])]))
            title = html.escape(f"{hint}; truth {tokenizer.decode([answer])!r}", quote=True)
            pieces.append(f'<mark{kind} title="{title}">{shown}</mark>')
            start = place + 1
        pieces.append(html.escape(tokenizer.decode(ids[start:-1].tolist())))
        parts.append(f"<h3>{html.escape(source)}</h3><p>{''.join(pieces)}</p>")
    note = "<p>Marked words are the model's first guess: yellow is right, red is wrong; hover for more.</p>"
    return note + "".join(parts)


def _is(row: dict[str, str], source: str, seq_len: int, ratio: float) -> bool:
    return row["source"] == source and int(row["seq_len"]) == seq_len and float(row["mask_ratio"]) == ratio


def _token_scale(total: int) -> tuple[float, str]:
    return (1e9, "billions") if total > 3e9 else (1e6, "millions")


def _image(figure: "Figure") -> str:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return f'<img alt="plot" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


if __name__ == "__main__":
    main()
