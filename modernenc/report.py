"""Write one self-contained page on a run: `python -m modernenc.report RUN_DIR` makes `report.html` and `curriculum.png`."""

import argparse
from dataclasses import replace
from pathlib import Path

from modernenc.cli import one_line_errors, take_allowed_code
from modernenc.saved_config import apply_overrides, load


def main() -> None:
    """Write the report of the run on the command line."""
    take_allowed_code()
    parser = argparse.ArgumentParser(prog="python -m modernenc.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run folder")
    parser.add_argument("overrides", nargs="*", metavar="data.root=DIR", help="where the corpus is now, for the passages")
    arguments = parser.parse_args()
    with one_line_errors():
        run = apply_overrides(replace(load(arguments.run_dir), run_dir=str(arguments.run_dir)), arguments.overrides)
        if not any(override.startswith("data.root=") for override in arguments.overrides) and "://" in run.data.root:
            run = replace(run, data=replace(run.data, root=""))  # a folder that may be anybody's names no server
        from modernenc.reporting.page import write  # torch takes seconds to import
        from modernenc.run_folder.load import without_cache

        print(write(without_cache(run, arguments.overrides)))


if __name__ == "__main__":
    main()
