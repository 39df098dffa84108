"""What is left of a run, under its own settings or changed ones: `python -m modernenc.remaining RUN_DIR|CKPT [KEY=VALUE ...]`.

Changed as `modernenc.resume` would change them (trainer.devices=4), or its `--rollback` (phases.decay.tokens=2e9): nothing is
trained, nothing is written. Speed is that of the run's own last steps in a phase; where there are none yet, it goes by FLOPs.
"""

import argparse
from pathlib import Path

from modernenc.cli import one_line_errors
from modernenc.config import Run


def main() -> None:
    """Print what is left of what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m modernenc.remaining", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="run folder (its newest checkpoint counts), or a checkpoint in it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    arguments = parser.parse_args()
    with one_line_errors():
        show(arguments.path, arguments.overrides)


def show(path: Path, overrides: list[str]) -> None:
    """Print a table of phases; the errors are those of finding a run."""
    from rich.console import Console
    from rich.table import Table

    from modernenc.checkpoints import read_manifest
    from modernenc.checks import check_settings
    from modernenc.model import locate
    from modernenc.resume import changed

    before, checkpoint = locate(path)
    run = changed(before, overrides)
    curriculum = check_settings(run)
    position = read_manifest(checkpoint)["tokens_seen"] if checkpoint else 0
    speeds = _speeds(before, run)
    print(f"left of {run.run_dir} after {position:,} of {curriculum.total_tokens:,} tokens")
    table = Table()
    for name in ("", "tokens", "steps", "tokens/s", "hours"):
        table.add_column(name, justify="right" if name else "left")
    tokens_left = steps_left = 0
    hours_left = 0.0
    for name in run.phases:
        levels = [level for level in curriculum.levels_of(name) if level.end_tokens > position]
        tokens = sum(level.end_tokens - max(position, level.first_tokens) for level in levels)
        steps = sum(level.steps - level.steps_in(max(position - level.first_tokens, 0)) for level in levels)
        hours = tokens / speeds[name] / 3600 if name in speeds else 0
        table.add_row(name, f"{tokens:,}", f"{steps:,}", f"{speeds[name]:,.0f}" if name in speeds else "-", f"{hours:,.3g}")
        tokens_left, steps_left, hours_left = tokens_left + tokens, steps_left + steps, hours_left + hours
    table.add_section()
    table.add_row("all", f"{tokens_left:,}", f"{steps_left:,}", "", f"{hours_left:,.3g}" if speeds else "-")
    Console(width=100).print(table)


def _speeds(before: Run, run: Run) -> dict[str, float]:
    """Tokens of row capacity a second by phase, on as many ranks as the changed run has; none before steps were recorded."""
    from modernenc import estimate
    from modernenc.lineage import read
    from modernenc.metrics import Table

    rows = Table(Path(before.run_dir) / "metrics.csv").read()
    entries = [entry for entry in read(Path(before.run_dir)) if entry["event"] != "branched"]
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


if __name__ == "__main__":
    main()
