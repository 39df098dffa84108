"""Find a run and its checkpoint on disk."""

from dataclasses import replace
from pathlib import Path

from modernenc.config import Run, load
from modernenc.run_folder import checkpoints


def locate(path: Path) -> tuple[Run, Path | None]:
    """Return the run and the whole checkpoint that a path names: a run folder's newest, or the checkpoint itself.

    A run that was stopped before its first checkpoint has none yet. Raises FileNotFoundError or ValueError, naming the file, if
    the path holds no run, or no whole checkpoint is left.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a run folder or one of its checkpoints/*.ckpt")
    named = path.suffix == ".ckpt"
    run_dir = path.resolve().parent.parent if named else path.resolve()
    run = replace(load(run_dir), run_dir=str(run_dir))
    if not named:
        return run, checkpoints.newest(run_dir)
    checkpoints.check(path)
    return run, path.resolve()
