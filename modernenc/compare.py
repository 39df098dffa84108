"""Validate checkpoints side by side: `python -m modernenc.compare CKPT|RUN_DIR|FOLDER ... [--average KIND]`.

All are validated on the same held-out rows with the same masks: those of the first one's run, at the length of its first phase
and a mask ratio of 15 %. With `--average`, the average of the checkpoints is validated too. Branches of a run are compared by
their folders. A Hugging Face folder with the same tokenizer may stand beside them.
"""

import argparse
from pathlib import Path

from modernenc.cli import one_line_errors, take_allowed_code


def main() -> None:
    """Compare what the command line names."""
    take_allowed_code()
    parser = argparse.ArgumentParser(
        prog="python -m modernenc.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="+", help="checkpoints, or run folders (their newest is taken); data.root=DIR if the corpus has moved"
    )
    parser.add_argument(
        "--average", action="append", default=[], help="also validate their average: exponential, one_minus_sqrt, uniform"
    )
    parser.add_argument("--across-runs", action="store_true", help="average checkpoints of runs that began apart")
    arguments = parser.parse_args()
    with one_line_errors():
        from modernenc.reporting.comparison import compare, show  # torch takes seconds to import

        overrides = [path for path in arguments.paths if path.startswith(("data.root=", "data.cache="))]
        paths = [Path(path) for path in arguments.paths if path not in overrides]
        show(compare(paths, arguments.average, arguments.across_runs, overrides))


if __name__ == "__main__":
    main()
