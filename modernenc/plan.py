"""Print what a recipe will do, from the object that trains it: `python -m modernenc.plan +recipe=NAME [KEY=VALUE ...]`.

--png FILE draws its curves, --json prints all numbers for programs, --against NAME the differences from another recipe.
`estimate.device=h100 estimate.price_per_hour=2.5` adds hours and cost; so does --measure, which trains some steps of each phase
on this machine.
"""

import argparse
import sys
from pathlib import Path

from modernenc.cli import run as run_cli
from modernenc.config import Run, register
from modernenc.planning.checks import check_settings
from modernenc.planning.resolve import resolve


def main() -> None:
    """Print what the command line requests; the data need not exist yet."""
    parser = argparse.ArgumentParser(prog="python -m modernenc.plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--against", default="")
    options, sys.argv[1:] = parser.parse_known_args()  # the rest is Hydra's

    def job(config: Run) -> None:
        run = resolve(config)
        check_settings(run)
        from modernenc.planning.show import show  # torch takes seconds to import

        curriculum = show(run, options.json, options.measure, options.against)
        if options.png:
            from modernenc.reporting.plots import draw_curriculum

            draw_curriculum(run, curriculum).savefig(options.png, dpi=110)

    register()
    run_cli(Run, ("recipe",), "train", job)


if __name__ == "__main__":
    main()
