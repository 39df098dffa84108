"""Write one self-contained page on a run: `python -m modernenc.report RUN_DIR` makes `report.html` and `curriculum.png`."""

import argparse
from dataclasses import replace
from pathlib import Path

from modernenc.cli import one_line_errors, take_allowed_code
from modernenc.config import load


def main() -> None:
    """Write the report of the run on the command line."""
    take_allowed_code()
    parser = argparse.ArgumentParser(prog="python -m modernenc.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run folder")
    run_dir = parser.parse_args().run_dir
    with one_line_errors():
        run = replace(load(run_dir), run_dir=str(run_dir))
        from modernenc.reporting.page import write  # torch takes seconds to import

        print(write(run))


if __name__ == "__main__":
    main()
