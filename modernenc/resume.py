"""Go on with a run: `python -m modernenc.resume RUN_DIR|CKPT [KEY=VALUE ...]`.

A run folder goes on from its newest whole checkpoint, a checkpoint from itself. KEY=VALUE may change where and how fast the
run trains (trainer.*, checkpoint.*, validation.*, watch.*, logger.*, data.root, data.cache, data.timeout_s, data.workers,
data.loader_timeout_s, cluster.*, estimate.*, and where the files of tasks are), not what it trains.

With --rollback the run goes back to the checkpoint, and on from there under other settings, such as optim.lr=1e-4, or past the
data that caused trouble. What it abandons is kept in its folder `abandoned`. To leave the run as it is, branch:
`python -m modernenc.train +recipe=NAME +from=CKPT`.
"""

import argparse
from pathlib import Path

from modernenc.cli import end_if_stopped, one_line_errors, take_allowed_code
from modernenc.run_folder.overrides import check_overrides
from modernenc.training.ranks import ending_as_rank


def main() -> None:
    """Resume what the command line names."""
    take_allowed_code()
    parser = argparse.ArgumentParser(
        prog="python -m modernenc.resume", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="run folder, or a checkpoint in it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    parser.add_argument("--rollback", action="store_true", help="go back to the checkpoint, under other settings")
    parser.add_argument(
        "--skip-tokens", type=int, default=0, metavar="N", help="with --rollback: skip the next N tokens of data"
    )
    arguments = parser.parse_intermixed_args()
    end_if_stopped("resume again")
    path, overrides = arguments.path, arguments.overrides
    with ending_as_rank(), one_line_errors():
        if arguments.skip_tokens and not arguments.rollback:
            raise ValueError(f"--skip-tokens {arguments.skip_tokens} makes another run: add --rollback")
        check_overrides(path, overrides, arguments.rollback)
        from modernenc.training import resume  # torch and Lightning take seconds to import

        if arguments.rollback:
            resume.rollback(path, overrides, arguments.skip_tokens)
        else:
            resume.resume(path, overrides)


if __name__ == "__main__":
    main()
