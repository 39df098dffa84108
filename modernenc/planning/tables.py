"""The plan of a run as text: tables of phases, mixes, checkpoints, validation and estimates."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from modernenc.cli import recipe
from modernenc.config import Phase, Run
from modernenc.curriculum import MASKED_LM, Curriculum, reads_text, sources_of
from modernenc.data import choices
from modernenc.data.blocks import VALIDATION, Corpus
from modernenc.evaluation.standard_error import standard_error
from modernenc.evaluation.validation import settings_of
from modernenc.planning.checks import check_settings
from modernenc.planning.estimate import parameters
from modernenc.planning.resolve import resolve
from modernenc.planning.sizes import buffered_tokens, corpus_of
from modernenc.planning.summary import summarize
from modernenc.saved_config import differences, plain

_WIDTH = 100


def plan_text(run: Run, curriculum: Curriculum) -> str:
    """Return the plan as plain text, as it is written to plan.txt."""
    out = StringIO()
    console = Console(file=out, width=_WIDTH)
    count, states = parameters(run)
    checkpoint_bytes = 4 * (count + states)
    console.print(f"recipe {run.recipe}: {count:,} parameters, {curriculum.total_tokens:,} tokens, "
                  f"{curriculum.total_steps:,} optimizer steps")  # fmt: skip
    corpus = corpus_of(run.data)
    console.print(_sizes(run, corpus) + "\n")
    console.print(_phases(run, curriculum, corpus))
    console.print(_mixes(run, curriculum, corpus))
    console.print(_checkpoints(run, curriculum, checkpoint_bytes))
    if corpus:
        console.print(_validation(run, curriculum, corpus))
    return out.getvalue().rstrip()


def _phases(run: Run, curriculum: Curriculum, corpus: Corpus | None) -> Table:
    table = Table(title="phases", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("")
    for name in run.phases:
        table.add_column(name, justify="right", overflow="fold")

    def row(title: str, value: Callable[[str, Phase], str]) -> None:
        table.add_row(title, *(value(name, phase) for name, phase in run.phases.items()))

    row("tokens", lambda name, _: f"{curriculum.end_of(name) - curriculum.start_of(name):,}")
    row("ends at token", lambda name, _: f"{curriculum.end_of(name):,}")
    row("steps", lambda name, _: f"{sum(stage.steps for stage in curriculum.stages_of(name)):,}")
    row("learning rate", lambda name, _: _lr(curriculum, name))
    if (ratio := run.optim.get("adamw_lr_ratio", 1)) != 1:
        row("learning rate of AdamW", lambda _, phase: f"peak {ratio * phase.lr:.3g}")
    row("curve", lambda _, phase: phase.lr_curve)
    row("warmup tokens", lambda _, phase: f"{phase.warmup_tokens:,.0f}")
    row("weight decay", lambda _, phase: f"{phase.weight_decay:g}")
    row("row length", lambda _, phase: f"{phase.seq_len:,}")
    row("rows x steps", lambda name, _: "\n".join(
        f"{stage.batch_rows:,} x {steps:,}" for stage in curriculum.stages_of(name)
        if (steps := stage.steps_of(MASKED_LM, stage.steps))) or "-")  # fmt: skip
    row("tokens a step", lambda _, phase: f"{phase.batch_rows * phase.seq_len:,}" if reads_text(phase) else "-")
    for task, settings in run.tasks.items():
        steps = {name: curriculum.steps_by_objective(name).get(task, 0) for name in run.phases}
        row(f"{task}: items x steps", lambda name, _, settings=settings, steps=steps: (
            f"{settings.batch_items:,} x {steps[name]:,}" if steps[name] else "-"))  # fmt: skip
    row("mask ratio", lambda _, phase: f"{phase.mask_ratio:g}")
    if any(phase.causal_share for phase in run.phases.values()):
        row("causal at first", lambda _, phase: f"{phase.causal_share:.0%}" if phase.causal_share else "-")
    attributes = [{**run.backbone, **curriculum.at(curriculum.start_of(name)).backbone} for name in run.phases]
    for key in sorted({key for phase in run.phases.values() for key in phase.backbone}):
        table.add_row(key, *(f"{values[key]:g}" for values in attributes))
    block = corpus.block_tokens if corpus else 0
    row("drawn, not trained on", lambda _, phase: f"<= {buffered_tokens(run, phase, block):,}")
    return table


def _lr(curriculum: Curriculum, phase: str) -> str:
    """Return the first, peak and last learning rate of a phase."""
    last = curriculum.stages_of(phase)[-1]
    first = curriculum.at(curriculum.start_of(phase))
    end = curriculum.at(last.end_tokens - last.last_step_tokens)
    steps = [first.lr, first.peak_lr, end.lr]
    return " -> ".join(f"{lr:.3g}" for number, lr in enumerate(steps) if number == 0 or lr != steps[number - 1])


def _sizes(run: Run, corpus: Corpus | None) -> str:
    """Return a line on lanes, packing buffers and vocabulary, and on who chose them."""
    data, vocabulary = run.data, run.backbone["vocab_size"]
    where = "from the corpus" if corpus else f"assumed, until {data.root} is prepared"
    taken = f" ({', '.join(data.from_corpus)}: {where})" if data.from_corpus else ""
    return f"{data.lanes:,} lanes that pack {data.buffer_rows:,} rows at a time, a vocabulary of {vocabulary:,}{taken}"


def _mixes(run: Run, curriculum: Curriculum, corpus: Corpus | None) -> Table:
    state = " and passes over what the corpus holds" if corpus else f" ({run.data.root} is not prepared yet)"
    title = f"mix, by tokens{state}"
    table = Table(title=title, title_justify="left")
    table.add_column("source", overflow="fold")
    for name in run.phases:
        table.add_column(name, justify="right")
    for source in dict.fromkeys(source for phase in run.phases.values() for source, share in phase.mix.items() if share):
        cells = []
        for name, phase in run.phases.items():
            share = phase.mix.get(source, 0) / (sum(phase.mix.values()) or 1)
            tokens = share * curriculum.text_tokens(name)
            held = sum(corpus.counts(path)["tokens"] for path in corpus.slices({source: 1})) if corpus else 0
            cells.append((f"{share:.1%}" + (f" ({tokens / held:.2f} passes)" if held else "")) if share else "-")
        table.add_row(source, *cells)
    for task, settings in run.tasks.items():
        items = {name: curriculum.steps_by_objective(name).get(task, 0) * settings.batch_items for name in run.phases}
        held = len(choices.read(Path(settings.train), "")) if Path(settings.train).is_file() else 0
        shown = {name: f"{drawn:,} items" + (f" ({drawn / held:.2f} passes)" if held else "") for name, drawn in items.items()}
        table.add_row(task, *(shown[name] if items[name] else "-" for name in run.phases))
    return table


def _checkpoints(run: Run, curriculum: Curriculum, size: int) -> Table:
    table = Table(title="checkpoints", title_justify="left")
    for column in ("each", "at boundaries", "between, written", "between, kept", "disk at most"):
        table.add_column(column, justify="right")
    every = run.checkpoint.every_tokens
    between = int(curriculum.total_tokens // every) if every else 0
    by_time = f" and every {run.checkpoint.every_minutes:g} min" if run.checkpoint.every_minutes else ""
    table.add_row(
        _bytes(size),
        str(len(run.phases)),
        f"{between}{by_time}",
        str(run.checkpoint.keep_last),
        # One more is written before the oldest goes.
        _bytes(size * (len(run.phases) + run.checkpoint.keep_last + 1)),
    )
    return table


def _validation(run: Run, curriculum: Curriculum, corpus: Corpus) -> Table:
    """Return a table of held-out tokens, the standard error that follows from them, and the cost of validation."""
    table = Table(title="validation, tokens of each source", title_justify="left", caption_justify="left")
    for column in ("", "held out", "read each time", "standard error of the loss at 15 %"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    read = 0
    for source in sources_of(run):
        held_out = corpus.sources[source][VALIDATION]["tokens"]
        used = min(held_out, run.validation.tokens_per_source)
        read += used
        table.add_row(source, f"{held_out:,}", f"{used:,}", f"about {standard_error(used):.3f} nat")
    every, times, tokens = int(run.validation.every_tokens), 0, 0
    for name in run.phases:
        start, end = curriculum.start_of(name), curriculum.end_of(name)
        here = 1 + ((end - 1) // every - start // every if every else 0)
        times += here
        tokens += here * read * len(settings_of(run, name))
    share = tokens / 3 / curriculum.total_tokens  # a forward pass is a third of a training step
    table.caption = (
        f"{times:,} times, at each length and mask ratio: {tokens:,} tokens, about {share:.1%} of the training's time"
    )
    return table


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def estimates_text(run: Run, summary: dict[str, Any]) -> str:
    """Return the estimates of FLOPs, memory, hours and cost, and the notes, as plain text."""
    out = StringIO()
    console = Console(file=out, width=_WIDTH)
    table = Table(title="what it takes, on each device (memory: at the most)", title_justify="left")
    table.add_column("")
    for name in summary["phases"]:
        table.add_column(name, justify="right", overflow="fold")

    def row(title: str, value: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(title, *(value(phase) for phase in summary["phases"].values()))

    row("matrix-product FLOPs", lambda phase: f"{phase['flops']:.3g}")
    row("weights and gradients", lambda phase: _bytes(phase["memory"]["weights"] + phase["memory"]["gradients"]))
    row("optimizer", lambda phase: _bytes(phase["memory"]["optimizer"]))
    row("activations, a micro-batch", lambda phase: _bytes(phase["memory"]["activations"]))
    row("memory", lambda phase: _bytes(phase["memory"]["total"]))
    if summary["hours"]:
        row("hours", lambda phase: f"{phase['hours']:,.3g}")
    console.print(table)
    total = f"{summary['flops']:.3g} FLOPs"
    if summary["hours"]:
        total += f", {summary['hours']:,.3g} hours, {summary['device_hours']:,.3g} device hours"
    if summary["cost"]:
        total += f", at {run.estimate.price_per_hour:g} each {summary['cost']:,.0f}"
    console.print(f"in all {total}")
    for warning in summary["warnings"]:
        console.print(f"note: {warning}", soft_wrap=True)
    return out.getvalue().rstrip()


def comparison_text(run: Run, name: str) -> str:
    """Return the settings in which another recipe differs, and the totals of both, as plain text."""
    other = resolve(recipe(name))
    table = Table(title=f"{run.recipe} and {name}", title_justify="left")
    for column in ("", run.recipe, name):
        table.add_column(column, overflow="fold")
    totals = [summarize(one, check_settings(one), corpus_of(one.data)) for one in (run, other)]
    for key in ("parameters", "tokens", "steps"):
        table.add_row(key, *(f"{total[key]:,}" for total in totals))
    table.add_row("FLOPs", *(f"{total['flops']:.3g}" for total in totals))
    if all(total["hours"] for total in totals):
        table.add_row("hours", *(f"{total['hours']:,.3g}" for total in totals))
    table.add_section()
    for key, here, there in differences(plain(run), plain(other)):
        if not key.startswith(("run_dir", "recipe", "data.hint")):
            table.add_row(key, *("-" if value is None else str(value) for value in (here, there)))
    out = StringIO()
    Console(file=out, width=_WIDTH).print(table)
    return out.getvalue().rstrip()
