"""Print what a recipe will do, from the object that trains it: `python -m modernenc.plan +recipe=NAME`."""

from collections.abc import Callable
from io import StringIO

from rich.console import Console
from rich.table import Table

from modernenc.cli import run as run_cli
from modernenc.config import Phase, Run, register
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.rehearsal import cut_down

_WIDTH = 100


def main(config: Run) -> None:
    """Check the settings and print the plan; the data need not be there yet."""
    from modernenc.checks import check_backbone, check_run, check_settings

    if config.rehearse:
        config = cut_down(config)
    curriculum = check_settings(config)
    check_backbone(config)
    if _corpus(config):
        check_run(config)
    print(text(config, curriculum))


def text(run: Run, curriculum: Curriculum) -> str:
    """The plan as plain text."""
    out = StringIO()
    console = Console(file=out, width=_WIDTH)
    parameters, checkpoint_bytes = _sizes(run)
    console.print(f"recipe {run.recipe}: {parameters:,} parameters, {curriculum.total_tokens:,} tokens, "
                  f"{curriculum.total_steps:,} optimizer steps\n")  # fmt: skip
    console.print(_phases(run, curriculum))
    console.print(_mixes(run, curriculum))
    console.print(_checkpoints(run, curriculum, checkpoint_bytes))
    return out.getvalue().rstrip()


def _phases(run: Run, curriculum: Curriculum) -> Table:
    table = Table(title="phases", title_justify="left")
    table.add_column("")
    for name in run.phases:
        table.add_column(name, justify="right", overflow="fold")

    def row(title: str, value: Callable[[str, Phase], str]) -> None:
        table.add_row(title, *(value(name, phase) for name, phase in run.phases.items()))

    row("tokens", lambda name, _: f"{curriculum.end_of(name) - curriculum.start_of(name):,}")
    row("ends at token", lambda name, _: f"{curriculum.end_of(name):,}")
    row("steps", lambda name, _: f"{sum(level.steps for level in curriculum.levels_of(name)):,}")
    row("learning rate", lambda name, _: _lr(curriculum, name))
    row("curve", lambda _, phase: phase.lr_curve)
    row("warmup tokens", lambda _, phase: f"{phase.warmup_tokens:,.0f}")
    row("weight decay", lambda _, phase: f"{phase.weight_decay:g}")
    row("row length", lambda _, phase: f"{phase.seq_len:,}")
    row("rows a step", lambda name, _: "\n".join(
        f"{level.batch_rows:,} x {level.steps:,} steps" for level in curriculum.levels_of(name)))  # fmt: skip
    row("tokens a step", lambda name, _: f"{curriculum.levels_of(name)[-1].step_tokens:,}")
    row("mask ratio", lambda _, phase: f"{phase.mask_ratio:g}")
    attributes = [{**run.backbone, **curriculum.at(curriculum.start_of(name)).backbone} for name in run.phases]
    for key in sorted({key for phase in run.phases.values() for key in phase.backbone}):
        table.add_row(key, *(f"{values[key]:g}" for values in attributes))
    row("unserved at end", lambda _, phase: f"<= {_unserved(run, phase):.1%}")
    return table


def _lr(curriculum: Curriculum, phase: str) -> str:
    """First, peak and last learning rate."""
    last = curriculum.levels_of(phase)[-1]
    first = curriculum.at(curriculum.start_of(phase))
    end = curriculum.at(last.end_tokens - last.step_tokens)
    steps = [first.lr, first.peak_lr, end.lr]
    return " -> ".join(f"{lr:.3g}" for number, lr in enumerate(steps) if number == 0 or lr != steps[number - 1])


def _corpus(run: Run) -> Corpus | None:
    """What data_prep made, if it has."""
    try:
        return Corpus.of(run.data)
    except FileNotFoundError:
        return None


def _unserved(run: Run, phase: Phase) -> float:
    """Tokens drawn but left in open windows at the phase's end, at most one window per lane, as a share of the phase."""
    return run.data.lanes * run.data.window_rows * phase.seq_len / phase.tokens


def _mixes(run: Run, curriculum: Curriculum) -> Table:
    corpus = _corpus(run)
    state = " and passes over what the corpus holds" if corpus else f" ({run.data.root} is not prepared yet)"
    title = f"mix, by tokens{state}"
    table = Table(title=title, title_justify="left")
    table.add_column("source", overflow="fold")
    for name in run.phases:
        table.add_column(name, justify="right")
    for source in dict.fromkeys(source for phase in run.phases.values() for source, share in phase.mix.items() if share):
        cells = []
        for name, phase in run.phases.items():
            share = phase.mix.get(source, 0) / sum(phase.mix.values())
            tokens = share * (curriculum.end_of(name) - curriculum.start_of(name))
            held = sum(corpus.counts(path)["tokens"] for path in corpus.slices({source: 1})) if corpus else 0
            cells.append((f"{share:.1%}" + (f" ({tokens / held:.2f} passes)" if held else "")) if share else "-")
        table.add_row(source, *cells)
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


def _sizes(run: Run) -> tuple[int, int]:
    """Parameters, and bytes of a checkpoint: fp32 weights and what the optimizer keeps for each."""
    import torch

    from modernenc.model import build_objective
    from modernenc.optim import state_numbers

    with torch.device("meta"):
        objective = build_objective(run)
    parameters = sum(parameter.numel() for parameter in objective.parameters())
    return parameters, 4 * (parameters + state_numbers(run.optim["_target_"], objective, objective.backbone))


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


if __name__ == "__main__":
    register()
    run_cli(Run, ("recipe",), "train", main)
