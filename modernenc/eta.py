"""Print what is left of a run, under its own settings or others: `python -m modernenc.eta RUN_DIR|CKPT [KEY=VALUE ...]`.

Settings may be changed as by `modernenc.resume` (trainer.devices=4) or by its `--rollback` (phases.decay.tokens=2e9): nothing
is trained, nothing is written. The speed is that of the run's own last steps in a phase; a phase without steps is extrapolated
by FLOPs.
"""

import argparse
from pathlib import Path

from modernenc.cli import one_line_errors, take_allowed_code


def main() -> None:
    """Print what is left of the run on the command line."""
    take_allowed_code()
    parser = argparse.ArgumentParser(
        prog="python -m modernenc.eta", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="run folder (its newest checkpoint counts), or a checkpoint in it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    arguments = parser.parse_args()
    with one_line_errors():
        from modernenc.planning.eta import show  # torch takes seconds to import

        show(arguments.path, arguments.overrides)


if __name__ == "__main__":
    main()
