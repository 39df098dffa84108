"""Go on with a run: `python -m modernenc.resume RUN_DIR|CKPT [KEY=VALUE ...]`.

A run folder goes on from its newest whole checkpoint, a checkpoint from itself. KEY=VALUE may change where and how fast the
run goes (trainer.*, checkpoint.*, validation.*, logger.*, data.root, data.workers), not what it trains.
"""

import argparse
from pathlib import Path
from typing import cast

from modernenc.cli import one_line_errors
from modernenc.config import Run

FREE = ("trainer.", "checkpoint.", "validation.", "logger.", "data.root=", "data.workers=")
"""Keys that do not change what a run trains."""


def main() -> None:
    """Resume what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m modernenc.resume", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="run folder, or a checkpoint in it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    arguments = parser.parse_args()
    with one_line_errors():
        resume(arguments.path, arguments.overrides)


def resume(path: Path, overrides: list[str]) -> None:
    """Resume from a run folder or a checkpoint; ValueError or FileNotFoundError names what is wrong."""
    for override in overrides:
        if not override.startswith(FREE) or "=" not in override:
            raise ValueError(
                f"{override}: a resumed run may change {', '.join(key.rstrip('=') for key in FREE)} only; "
                "anything else makes another run: start it with python -m modernenc.train"
            )

    from omegaconf import OmegaConf

    from modernenc.model import locate

    run, checkpoint = locate(path)

    from modernenc import checkpoints
    from modernenc.checks import check_hardware, check_run
    from modernenc.data.loader import open_mixes
    from modernenc.fit import fit

    merged = OmegaConf.merge(OmegaConf.structured(run), OmegaConf.from_dotlist(overrides))
    run = cast(Run, OmegaConf.to_object(merged))
    curriculum, corpus = check_run(run)
    check_hardware(run)
    open_mixes(run, corpus)
    if checkpoints.read_manifest(checkpoint)["tokens_seen"] >= curriculum.total_tokens:
        print(f"{run.run_dir} is finished: {checkpoint} is at the end of the curriculum")
        return
    fit(run, curriculum, corpus, checkpoint)


if __name__ == "__main__":
    main()
