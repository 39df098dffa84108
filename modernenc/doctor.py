"""Say what this machine will do, and what to mend before a run: `python -m modernenc.doctor [RUN_DIR] [--data DIR]`.

Packages, devices, attention, cores, memory, files, disk, SLURM and Weights & Biases; with RUN_DIR or --data also how fast the
corpus is read, and with RUN_DIR whether that is fast enough. Status 1 if something will keep a run from working.
"""

import argparse
from pathlib import Path

from modernenc.cli import one_line_errors, take_allowed_code


def main() -> None:
    """Examine this machine."""
    take_allowed_code()
    parser = argparse.ArgumentParser(
        prog="python -m modernenc.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN_DIR", help="run folder, whose corpus and disk count")
    parser.add_argument("--data", default="", metavar="DIR", help="corpus, if it is not that of RUN_DIR")
    arguments = parser.parse_args()
    with one_line_errors():
        findings = _examine(arguments.run, arguments.data)
    raise SystemExit(findings)


def _examine(folder: Path | None, data: str) -> int:
    """Print a line for each finding, with what to do below; return the exit status."""
    from rich.console import Console

    from modernenc.planning.machine import examine  # imports torch

    console, worst = Console(highlight=False, soft_wrap=True), 0
    marks = ["[green]ok[/]  ", "[yellow]note[/]", "[red]bad[/] "]
    for finding in examine(folder, data):
        console.print(f"{marks[finding.level]} [bold]{finding.subject}[/]: ", end="")
        console.print(finding.said, markup=False)
        if finding.remedy:
            console.print(f"       -> {finding.remedy}", markup=False)
        worst = max(worst, finding.level)
    return int(worst == 2)


if __name__ == "__main__":
    main()
