"""One self-contained HTML page on a run: `report.html`, and the picture of its curriculum, `curriculum.png`."""

import base64
import html
import io
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from tokenizers import Tokenizer

from modernenc.config import CONFIG, Run
from modernenc.curriculum import CHOICES, MASKED_LM, Curriculum
from modernenc.data.blocks import VALIDATION, Corpus
from modernenc.data.packing import SPECIALS
from modernenc.evaluation.standard_error import FIXED_RATIO
from modernenc.model.load import load_masked_lm
from modernenc.reporting.plots import (
    draw_curriculum,
    draw_lineage,
    draw_loss,
    draw_task,
    draw_throughput,
    is_setting,
    unigram,
    unigrams,
)
from modernenc.run_folder import checkpoints, lineage
from modernenc.run_folder.load import locate
from modernenc.run_folder.tables import ALL, Table

REPORT = "report.html"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } img { max-width: 100% }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
mark { background: #fff2a8 } .wrong { background: #ffd9d3 } .facts b { font-size: 1.3em } .facts td { text-align: left }
"""


def write(run: Run) -> Path:
    """Write the report and the picture of the curriculum from what the run folder holds so far; return the report's path."""
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
        "<h2>Loss</h2>", _image(draw_loss(run, curriculum, training, validation)),
        "<h2>Validation</h2>", _validation_table(run, validation),
        *(_task(run, curriculum, task, metrics, scores) for task in run.tasks),
        "<h2>Curriculum</h2>", _image(picture),
        "<h2>Throughput</h2>", _image(draw_throughput(curriculum, metrics)),
        "<h2>Tokens</h2>", _token_table(run_dir),
        "<h2>Fill-mask on held-out text</h2>", _samples(run, run_dir),
        "<h2>Lineage</h2>", _lineage(run_dir, curriculum, training),
        "<h2>Configuration</h2>", _preformatted((run_dir / CONFIG).read_text()),
    ]  # fmt: skip
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(run.recipe)}</title><style>{_STYLE}</style>"
    path = run_dir / REPORT
    path.write_text(page + "\n".join(sections))
    return path


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
    finals = [row for row in validation if is_setting(row, ALL, first, FIXED_RATIO)]
    if finals:
        cells.append((f"validation loss, rows of {first}, 15 %", f"{float(finals[-1]['loss']):.3f} nats"))
    head = "".join(f"<td>{name}<br><b>{value}</b></td>" for name, value in cells)
    return f"<table class=facts><tr>{head}</tr></table>"


def _validation_table(run: Run, validation: list[dict[str, str]]) -> str:
    """Return the loss per source at the last step of each phase, beside the unigram baseline."""
    if not validation:
        return "<p>No validation yet.</p>"
    baseline = {**unigrams(run), ALL: unigram(run, validation)}
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
            lines.append(f"<tr><td>{html.escape(source)}</td><td>{baseline[source]:.3f}</td>{values}{accuracy}</tr>")
        title = f"<h3>Rows of {seq_len}, {ratio:.0%} predicted (nats per token)</h3>"
        header = f"<tr><th>source</th><th>unigram</th>{head}<th>accuracy now</th></tr>"
        tables.append(f"{title}<table>{header}{''.join(lines)}</table>")
    return "".join(tables)


def _task(run: Run, curriculum: Curriculum, task: str, metrics: list[dict[str, str]], scores: list[dict[str, str]]) -> str:
    """Return the accuracy on a task's held-out items, as a curve and at the end of each phase."""
    validated = [row for row in scores if row["source"] == task]
    if not validated:
        return ""
    figure = draw_task(curriculum, [row for row in metrics if row["objective"] == task], validated)
    ends = {row["phase"]: row for row in validated}
    head = "".join(f"<th>end of {html.escape(phase)}</th>" for phase in ends)
    cells = "".join(f"<td>{float(row['accuracy']):.1%}</td>" for row in ends.values())
    table = f"<table><tr><th>items</th>{head}</tr><tr><td>{int(validated[-1]['targets']):,}</td>{cells}</tr></table>"
    return f"<h2>{html.escape(task)}: which of {CHOICES} endings</h2>{_image(figure)}{table}"


def _token_table(run_dir: Path) -> str:
    """Return a table of where the tokens of each phase went, up to the newest checkpoint."""
    checkpoint = checkpoints.newest(run_dir)
    if checkpoint is None:
        return "<p>No checkpoint yet.</p>"
    accounts = checkpoints.read(checkpoint).state.data["token_counts"]
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
        for name in ("phase", "text", "cls, sep", "padding", "left in buffers", "skipped", "cuts", "fill", "served")
    )
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _lineage(run_dir: Path, curriculum: Curriculum, training: list[dict[str, str]]) -> str:
    """Return the history of the run as a table, with a picture if it is not a single line."""
    entries = lineage.read(run_dir)
    lines = []
    for entry in entries:
        notes = [*entry.get("changed", [])]
        if entry.get("skipped_tokens"):
            notes.append(f"skipped {entry['skipped_tokens']:,} tokens of data")
        notes += [f"{word} {entry[key]}" for key, word in (("abandoned", "abandoned into"), ("into", "into")) if key in entry]
        notes.append(lineage.describe_versions(entry.get("versions", {})))
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
    return (_image(draw_lineage(run_dir, curriculum, training, entries)) if forks else "") + table


def _samples(run: Run, run_dir: Path) -> str:
    """Return one held-out passage per source, with some masked words as the newest checkpoint fills them."""
    _, checkpoint = locate(run_dir)
    if checkpoint is None:
        return "<p>No checkpoint yet.</p>"
    corpus = Corpus.of(run.data)
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    objective = load_masked_lm(run, checkpoint)
    longest = objective.backbone.max_position - SPECIALS
    parts = []
    for source in corpus.sources:
        text = corpus.open(f"{source}/{VALIDATION}").read(0, 0).tokens[: min(80, longest)].astype("int64")
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


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return f'<img alt="plot" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"
