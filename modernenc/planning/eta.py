"""The tokens, steps and hours that are left of a run."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from modernenc.config import Run
from modernenc.planning import estimate
from modernenc.planning.checks import check_settings
from modernenc.planning.model_checks import check_backbone
from modernenc.run_folder import lineage, tables
from modernenc.run_folder.checkpoints import read_manifest
from modernenc.run_folder.load import locate
from modernenc.saved_config import apply_overrides


def show(path: Path, overrides: list[str]) -> None:
    """Print a table of phases; errors are those of locating a run."""
    before, checkpoint = locate(path)
    run = apply_overrides(before, overrides)
    curriculum = check_settings(run)
    check_backbone(run)
    position = read_manifest(checkpoint)["tokens_seen"] if checkpoint else 0
    speeds = _speeds(before, run)
    print(f"left of {run.run_dir} after {position:,} of {curriculum.total_tokens:,} tokens")
    table = Table()
    for name in ("", "tokens", "steps", "tokens/s", "hours"):
        table.add_column(name, justify="right" if name else "left")
    tokens_left = steps_left = 0
    hours_left = 0.0
    for name in run.phases:
        stages = [stage for stage in curriculum.stages_of(name) if stage.end_tokens > position]
        tokens = sum(stage.end_tokens - max(position, stage.first_tokens) for stage in stages)
        steps = sum(stage.steps - stage.steps_in(max(position - stage.first_tokens, 0)) for stage in stages)
        hours = tokens / speeds[name] / 3600 if name in speeds else 0
        table.add_row(name, f"{tokens:,}", f"{steps:,}", f"{speeds[name]:,.0f}" if name in speeds else "-", f"{hours:,.3g}")
        tokens_left, steps_left, hours_left = tokens_left + tokens, steps_left + steps, hours_left + hours
    table.add_section()
    table.add_row("all", f"{tokens_left:,}", f"{steps_left:,}", "", f"{hours_left:,.3g}" if speeds else "-")
    Console(width=100).print(table)


def _speeds(before: Run, run: Run) -> dict[str, float]:
    """Return the speed of each phase, in tokens of row capacity a second, scaled from the ranks of `before` to those of `run`.

    A phase without recorded steps is extrapolated by FLOPs; without any recorded step the answer is empty.
    """
    rows = tables.Table(Path(before.run_dir) / "metrics.csv").read()
    entries = [entry for entry in lineage.read(Path(before.run_dir)) if entry["event"] != "branched"]
    then = entries[-1]["ranks"] if entries else 1
    now = run.trainer.devices * run.trainer.num_nodes
    seen = {}
    for name in before.phases:
        mine = [row for row in rows if row["phase"] == name][-50:]
        if len(mine) > 1 and float(mine[-1]["seconds"]) > float(mine[0]["seconds"]):
            tokens = int(mine[-1]["tokens_seen"]) - int(mine[0]["tokens_seen"])
            seen[name] = tokens / (float(mine[-1]["seconds"]) - float(mine[0]["seconds"])) * now / then
    if not seen:
        return {}
    last = list(seen)[-1]
    flops = {name: estimate.flops(run, phase, None) for name, phase in run.phases.items()}
    return {name: seen.get(name, seen[last] * flops[last] / flops[name]) for name in run.phases if last in run.phases}
