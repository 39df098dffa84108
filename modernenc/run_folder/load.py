"""Find a run and its checkpoint on disk."""

import logging
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from modernenc.config import Run
from modernenc.run_folder import checkpoints
from modernenc.saved_config import from_plain, load

log = logging.getLogger(__name__)


def locate(path: Path) -> tuple[Run, Path | None]:
    """Return the run and the whole checkpoint that a path names: a run folder's newest, or the checkpoint itself.

    A run that was stopped before its first checkpoint has none yet. Raises FileNotFoundError or ValueError, naming the file, if
    the path holds no run, or no whole checkpoint is left.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a run folder or one of its checkpoints/*.ckpt")
    named = path.suffix == ".ckpt"
    run_dir = path.resolve().parent.parent if named else path.resolve()
    run = replace(_settings(run_dir), run_dir=str(run_dir))
    if not named:
        return run, checkpoints.newest(run_dir)
    checkpoints.check(path)
    return run, path.resolve()


def check_root(run: Run, overrides: Iterable[str]) -> None:
    """Raise ValueError if the corpus of a saved run is remote and the user does not name it: the folder may be anybody's."""
    if "://" in run.data.root and not any(override.startswith("data.root=") for override in overrides):
        raise ValueError(
            f"data.root={run.data.root}: a run folder may name a remote corpus only if you do too; add "
            f"{shlex.quote(f'data.root={run.data.root}')}"
        )


def without_cache(run: Run, overrides: Iterable[str]) -> Run:
    """Return the run reading a local corpus in place, unless the user names a cache: a folder names no place to write to."""
    if "://" in run.data.root or any(override.startswith("data.cache=") for override in overrides):
        return run
    return replace(run, data=replace(run.data, cache=""))


def _settings(run_dir: Path) -> Run:
    """Return the configuration of a run, from its newest checkpoint if its file is missing or damaged."""
    try:
        return load(run_dir)
    except (FileNotFoundError, ValueError) as error:
        checkpoint = checkpoints.newest(run_dir)
        if checkpoint is None:
            raise
        try:
            run = from_plain(checkpoints.read(checkpoint).run)
        except OmegaConfBaseException as damage:
            raise ValueError(f"{checkpoint}: {' '.join(str(damage).split())}") from damage
        log.warning("%s; its settings are taken from %s", error, checkpoint)
        return run
