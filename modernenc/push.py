"""Upload a run to the Hugging Face hub, a revision for each phase: `python -m modernenc.push RUN_DIR OWNER/NAME`.

The newest checkpoint becomes the branch `main`, and the end of each phase a branch of the phase's name, so that
`from_pretrained("OWNER/NAME", revision="stable")` loads what `stable` ended with. A repository that does not exist is made, and
is private unless --public. --dry-run exports and checks all, and sends nothing.
"""

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modernenc.cli import one_line_errors, take_allowed_code

MAIN = "main"
"""The branch that `from_pretrained` takes by itself."""


def main() -> None:
    """Upload what the command line names."""
    take_allowed_code()
    parser = argparse.ArgumentParser(
        prog="python -m modernenc.push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="run folder")
    parser.add_argument("repository", metavar="OWNER/NAME", help="repository on the hub")
    parser.add_argument("--public", action="store_true", help="if the repository is new, let everybody read it")
    parser.add_argument("--dry-run", action="store_true", help="send nothing: needs neither network nor login")
    arguments = parser.parse_args()
    with one_line_errors():
        _push(arguments.run, arguments.repository, arguments.public, arguments.dry_run)


def _push(folder: Path, repository: str, public: bool, dry_run: bool) -> None:
    from huggingface_hub import HfApi, get_token

    from modernenc.model.export import export
    from modernenc.run_folder.load import locate

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise ValueError(f"{repository}: expected OWNER/NAME of a repository on the hub")
    run, newest = locate(folder)
    if newest is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint yet: nothing to upload")
    if not (dry_run or get_token()):
        raise ValueError("nobody is logged in to the Hugging Face hub; run `hf auth login`, or set HF_TOKEN")
    hub = HfApi()
    if not dry_run:
        _send(hub.create_repo, repository, private=not public, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for revision, checkpoint in {**_ends_of_phases(Path(run.run_dir), list(run.phases)), MAIN: newest}.items():
            out = Path(scratch) / revision
            export([checkpoint], out, name=repository, revision="" if revision == MAIN else revision)
            if not dry_run:
                if revision != MAIN:
                    _send(hub.create_branch, repository, branch=revision, exist_ok=True)
                title = f"{run.recipe}, {checkpoint.stem}"
                _send(hub.upload_folder, repository, folder_path=out, revision=revision, commit_message=title)
            size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
            holds = "would hold" if dry_run else "holds"
            print(f"{repository}, revision {revision}: {holds} {checkpoint.name}, {size / 1e6:,.1f} MB", flush=True)


def _send(call: Callable[..., Any], repository: str, **arguments: Any) -> None:
    """Make a call of the hub; OSError with what it says if it fails."""
    try:
        call(repo_id=repository, **arguments)
    except Exception as error:  # what its versions raise without a network has no class in common
        said = " ".join(str(error).split())
        raise OSError(f"{repository} could not be written: {said}; the same command again goes on") from error


def _ends_of_phases(run_dir: Path, phases: list[str]) -> dict[str, Path]:
    """Return the checkpoint at the end of each phase that has one, by the phase's name."""
    from modernenc.run_folder import checkpoints

    ends = {phase: run_dir / checkpoints.FOLDER / f"{checkpoints.name_at_end(phase)}.ckpt" for phase in phases}
    return {phase: checkpoint for phase, checkpoint in ends.items() if checkpoints.is_finished(checkpoint)}


if __name__ == "__main__":
    main()
