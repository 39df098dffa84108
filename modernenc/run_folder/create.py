"""Create the folder of a new run."""

import secrets
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import yaml
from yaml import YAMLError

from modernenc.atomic import write_text
from modernenc.config import Logger, Run
from modernenc.run_folder import checkpoints, lineage
from modernenc.run_folder.lock import LOG, try_acquire
from modernenc.saved_config import CONFIG, plain, save

CORPUS = "corpus"
"""Folder in a run folder with the corpus's manifest and tokenizer, so that the run can be exported without the corpus."""


def create(
    run: Run,
    plan: str,
    branch: checkpoints.Checkpoint | None = None,
    numbered: bool = False,
    corpus_files: Iterable[Path] = (),
) -> Run:
    """Create the run folder and return the run with its folder and id.

    It holds the text of the plan, copies of small files of the corpus, and the checkpoint of a branch; the configuration comes
    last.

    With `numbered`, an existing folder belongs to another run, and this run's folder gets a number as suffix. ValueError if the
    folder holds a run already, or another process starts one in it; OSError if it cannot be written.
    """
    folder = _make_folder(Path(run.run_dir), numbered)
    with _lock_for_start(folder):
        run = replace(run, run_dir=str(folder), logger=new_id(run.logger))
        if branch is not None:
            checkpoints.write(replace(branch, run=plain(run)), folder / checkpoints.FOLDER / f"{checkpoints.BRANCH}.ckpt")
        write_plan(folder, plan)
        (folder / CORPUS).mkdir(exist_ok=True)
        for file in corpus_files:
            shutil.copyfile(file, folder / CORPUS / file.name)
        lineage.write(folder, [])
        save(run)
    return run


def new_id(logger: Logger) -> Logger:
    """Return the settings with an id of their own, in the group of the run that they came from, if any."""
    run_id = secrets.token_hex(4)
    return replace(logger, run_id=run_id, group=logger.group or run_id)


def write_plan(folder: Path, plan: str) -> None:
    """Write the text of the plan into a run folder."""
    write_text(folder / "plan.txt", plan + "\n")


def _make_folder(folder: Path, numbered: bool) -> Path:
    """Create the folder and return it, with a number as suffix if it exists and may have one."""
    if not numbered:
        _check_holds_no_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for number in count(1):
        made = folder.with_name(f"{folder.name}-{number}") if number > 1 else folder
        try:
            made.mkdir(parents=True)
        except FileExistsError:
            continue
        return made
    raise AssertionError("count() does not end")


@contextmanager
def _lock_for_start(folder: Path) -> Iterator[None]:
    """Hold the lock on the folder; ValueError if another process holds it, or has started a run meanwhile."""
    with (folder / LOG).open("a") as file:
        if not try_acquire(file, folder):
            raise ValueError(f"run_dir={folder} is being started by another process; choose another run_dir")
        _check_holds_no_run(folder)
        yield


def _check_holds_no_run(folder: Path) -> None:
    """Raise ValueError if the folder holds a run, or checkpoints of one."""
    kept = [path for path in (folder / checkpoints.FOLDER).glob("*.ckpt") if path.stem != checkpoints.BRANCH]
    if kept:  # the checkpoint of a branch may be left by a start that was interrupted
        raise ValueError(
            f"run_dir={folder} holds {kept[0].name} of another run; go on with it by python -m modernenc.resume "
            f"{shlex.quote(str(folder))}, or choose another run_dir"
        )
    if (folder / CONFIG).exists():
        try:
            held = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        except (YAMLError, ValueError):
            held = None
        recipe = f" of recipe {held['recipe']}" if isinstance(held, dict) and "recipe" in held else ""
        raise ValueError(
            f"run_dir={folder} holds a run{recipe}; "
            f"go on with it by python -m modernenc.resume {shlex.quote(str(folder))}, or choose another run_dir"
        )
