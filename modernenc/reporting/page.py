"""One self-contained HTML page on a run: `report.html`, and the picture of its curriculum, `curriculum.png`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tokenizers import Tokenizer

from modernenc.atomic import replacing, write_text
from modernenc.config import Run
from modernenc.curriculum import CHOICES, OF_TEXT, Curriculum
from modernenc.data.blocks import MANIFEST, VALIDATION, corpus_of
from modernenc.data.packing import SPECIALS
from modernenc.model.load import masked_lm_of, small_corpus
from modernenc.reporting import plots
from modernenc.reporting.plots import Rows, rows_of
from modernenc.run_folder import checkpoints, lineage
from modernenc.run_folder.checkpoints import Checkpoint
from modernenc.run_folder.create import CORPUS
from modernenc.run_folder.tables import ALL, FIXED_RATIO, Table
from modernenc.saved_config import CONFIG

Lines = list[list[str]]
"""Cells of a table, line by line."""

REPORT = "report.html"
PASSAGE, FIRST_MASK, MASK_EVERY = 80, 8, 12
"""Tokens of a passage that is shown with masked tokens; the first of these, and their distance."""


def write(run: Run) -> Path:
    """Write the report and the picture of the curriculum from what the run folder holds so far; return the report's path."""
    matplotlib.use("Agg")
    run_dir, curriculum = Path(run.run_dir), Curriculum.of(run)
    metrics, scores = Table(run_dir / "metrics.csv").read(), Table(run_dir / "validation.csv").read()
    evaluated = Table(run_dir / "evaluations.csv").read()
    training = [row for row in metrics if row["objective"] in OF_TEXT]
    validation = [row for row in scores if row["source"] not in run.tasks]
    unigram = unigram_nats(run, validation)
    if unknown := {row["source"] for row in validation} - {ALL, *unigram}:
        raise ValueError(
            f"{run_dir / 'validation.csv'} has scores of {', '.join(sorted(unknown))}, which "
            f"{run_dir / CORPUS / MANIFEST} lacks; restore the one that is damaged from a copy"
        )
    newest = checkpoints.newest(run_dir)
    checkpoint = checkpoints.read(newest) if newest else None
    entries = lineage.read(run_dir)
    is_forked = any(entry["event"] in ("rollback", "branch", "branched") for entry in entries)
    picture = plots.draw_curriculum(run, curriculum)
    image = run_dir / "curriculum.png"
    with replacing(image) as partial:  # a link of this name is replaced, and not followed out of the folder
        picture.savefig(partial, format="png", dpi=110)
    values = {
        "recipe": run.recipe,
        "facts": list(_facts(run, curriculum, training, validation)),
        "loss": plots.as_png(plots.draw_loss(run, curriculum, metrics, validation, unigram.get(ALL))),
        "validation": list(_validation_tables(validation, unigram)),
        "tasks": list(_tasks(run, curriculum, metrics, scores)),
        "evaluations": plots.as_png(plots.draw_evaluations(curriculum, evaluated)) if evaluated else "",
        "curriculum": plots.as_png(picture),
        "throughput": plots.as_png(plots.draw_throughput(curriculum, metrics)),
        "tokens": list(_token_counts(checkpoint)) if checkpoint else [],
        "passages": dict(_fill_masks(run, checkpoint, newest)) if checkpoint and newest else {},
        "forks": plots.as_png(plots.draw_lineage(run_dir, curriculum, training, entries)) if is_forked else "",
        "history": [_history_row(entry) for entry in entries],
        "configuration": (run_dir / CONFIG).read_text(),
    }
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    path = run_dir / REPORT
    write_text(path, environment.get_template("page.html").render(values))
    return path


def unigram_nats(run: Run, validation: Rows) -> dict[str, float]:
    """Return the nats per held-out token for a model that knows only the frequencies of tokens, by source and over all.

    Over all, each source has its weight in validation. Without a validation yet there is no value over all.
    """
    nats = {source: entry[VALIDATION]["unigram_nats"] for source, entry in small_corpus(run).sources.items()}
    last = [row for row in validation if row["step"] == validation[-1]["step"]]
    targets = {row["source"]: int(row["targets"]) for row in last if row["source"] in nats}
    if any(targets.values()):
        nats[ALL] = sum(nats[source] * count for source, count in targets.items()) / sum(targets.values())
    return nats


def _facts(run: Run, curriculum: Curriculum, training: Rows, validation: Rows) -> Iterator[tuple[str, str]]:
    if training:
        last = training[-1]
        yield "tokens seen", f"{int(last['tokens_seen']):,} of {curriculum.total_tokens:,}"
        yield "training time", f"{float(last['seconds']) / 60:.1f} min"
        yield "training loss", f"{float(last['loss']):.3f} nats"
        first = next(iter(run.phases.values())).seq_len
        for row in rows_of(validation, first, FIXED_RATIO, ALL)[-1:]:
            yield f"validation loss, rows of {first}, 15 %", f"{float(row['loss']):.3f} nats"


def _validation_tables(validation: Rows, unigram: dict[str, float]) -> Iterator[tuple[str, list[str], Lines]]:
    """Yield a table for each row length and mask ratio: the loss per source at the last step of each phase."""
    for seq_len, ratio in sorted({(int(row["seq_len"]), float(row["mask_ratio"])) for row in validation}):
        rows = rows_of(validation, seq_len, ratio)
        ends = {row["phase"]: row["step"] for row in rows}
        lines = []
        for source in dict.fromkeys(row["source"] for row in rows):
            mine = rows_of(rows, seq_len, ratio, source)
            losses = {row["phase"]: f"{float(row['loss']):.3f}" for row in mine if ends[row["phase"]] == row["step"]}
            at_ends = [losses.get(phase, "-") for phase in ends]
            lines.append([source, f"{unigram[source]:.3f}", *at_ends, f"{float(mine[-1]['accuracy']):.1%}"])
        header = ["source", "unigram", *(f"end of {phase}" for phase in ends), "accuracy now"]
        yield f"Rows of {seq_len}, {100 * ratio:.0f} % predicted (nats per token)", header, lines


def _tasks(run: Run, curriculum: Curriculum, metrics: Rows, scores: Rows) -> Iterator[tuple[str, str, list[str], Lines]]:
    """Yield title, plot and table of each task: the accuracy on held-out items, as a curve and at the end of each phase."""
    for task in run.tasks:
        validated = [row for row in scores if row["source"] == task]
        if validated:
            figure = plots.draw_task(curriculum, [row for row in metrics if row["objective"] == task], validated)
            ends = {row["phase"]: f"{float(row['accuracy']):.1%}" for row in validated}
            header = ["items", *(f"end of {phase}" for phase in ends)]
            line = [f"{int(validated[-1]['targets']):,}", *ends.values()]
            yield f"{task}: which of {CHOICES} endings", plots.as_png(figure), header, [line]


def _token_counts(checkpoint: Checkpoint) -> Iterator[list[str]]:
    """Yield a line on where the tokens of each phase went, up to a checkpoint."""
    for phase, counts in checkpoint.state.data["token_counts"].items():
        served, drawn = (sum(counts[which].values()) for which in ("served", "drawn"))
        special, padding, skipped, cuts = (counts[which] for which in ("special", "padding", "skipped", "cuts"))
        fill = 1 - padding / (served + special + padding)
        by_source = (f"{name.partition('/')[0]} {tokens / served:.1%}" for name, tokens in sorted(counts["served"].items()))
        numbers = (served, special, padding, drawn - served - skipped, skipped, cuts)
        yield [phase, *(f"{number:,}" for number in numbers), f"{fill:.2%}", ", ".join(by_source)]


def _history_row(entry: dict[str, Any]) -> list[str]:
    """Return an entry of the lineage as the cells of a table."""
    notes = list(entry.get("changed", []))
    if entry.get("skipped_tokens"):
        notes.append(f"skipped {entry['skipped_tokens']:,} tokens of data")
    notes += [f"{words} {entry[key]}" for key, words in (("abandoned", "abandoned into"), ("into", "into")) if key in entry]
    notes.append(lineage.describe_versions(entry.get("versions", {})))
    position = f"{entry['tokens_seen']:,}"
    return [entry["time"], entry["event"], entry["checkpoint"], position, str(entry["ranks"]), "; ".join(notes)]


def _fill_masks(run: Run, checkpoint: Checkpoint, path: Path) -> Iterator[tuple[str, list[tuple[str, str, bool, str]]]]:
    """Yield each source with one held-out passage, some of whose tokens are masked and filled in by a checkpoint's model.

    A passage is a list of pieces: a text, the model's first guess for the token after it, whether that is right, and its
    likeliest guesses with the truth. The last piece has a text only. Nothing is yielded where the text is not at hand.
    """
    corpus = corpus_of(run.data)
    if corpus is None or corpus.tokenizer_file.read_bytes() != small_corpus(run).tokenizer_file.read_bytes():
        return
    model = masked_lm_of(checkpoint, path)
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    longest = min(PASSAGE, model.backbone.max_position - SPECIALS)
    for source in corpus.sources:
        text = corpus.open(f"{source}/{VALIDATION}").read(0, 0).tokens[:longest].tolist()
        original = torch.tensor([corpus.roles.cls, *text, corpus.roles.sep])
        places = torch.arange(FIRST_MASK, len(original) - 1, MASK_EVERY)
        ids = original.index_fill(0, places, corpus.roles.mask)
        with torch.no_grad():
            logits = model.logits(ids, torch.tensor([0, len(ids)], dtype=torch.int32), len(ids), places)
        best = logits.softmax(-1).topk(3)
        pieces, start = [], 1
        for place, chances, guesses in zip(places.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
            words = [tokenizer.decode([guess]) for guess in guesses]
            hint = ", ".join(f"{word!r} {chance:.0%}" for word, chance in zip(words, chances, strict=True))
            truth = int(original[place])
            hint += f"; truth {tokenizer.decode([truth])!r}"
            pieces.append((tokenizer.decode(ids[start:place].tolist()), words[0], guesses[0] == truth, hint))
            start = place + 1
        yield source, [*pieces, (tokenizer.decode(ids[start:-1].tolist()), "", False, "")]
