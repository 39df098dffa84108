"""Checkpoints: written whole or not at all, in the background, checked before they are trusted.

`checkpoints/end-of-<phase>.ckpt` at each boundary, `checkpoints/step-<step>.ckpt` between. Beside each lies a manifest of the
same name (`.json`) with size, hash and position, written last: a checkpoint without a matching one is not whole.

A checkpoint holds plain values and whole tensors by name, whatever the strategy and the number of ranks: `weights`,
`optimizers`, `state` (position, data), `run` (the configuration). Lightning's own are not used: they know optimizer states by
position, differ between strategies, and are copied out of $TMPDIR, which a kill can cut short (Lightning#21253).
"""

import json
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from modernenc.hashing import hash_file

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
POSITION = ("tokens_seen", "step", "phase", "boundary")
_UNFINISHED = ".tmp"


class Writer:
    """Saves checkpoints of one run, one at a time, on a thread: training waits for the copy only.

    What goes wrong is raised by the next `save`, `check` or `close`, as OSError naming the file.
    """

    def __init__(self, run_dir: Path, keep_last: int) -> None:
        self.run_dir = run_dir
        self.keep_last = keep_last
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def save(self, content: dict[str, Any], name: str) -> None:
        """Write a checkpoint that no one else will change; waits for the one before."""
        self.wait()
        self._writing = self._thread.submit(self._write, content, self.run_dir / FOLDER / f"{name}.ckpt")

    def check(self) -> None:
        """Raise what went wrong, if it is known."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def wait(self) -> None:
        """Return when all is on disk."""
        if self._writing is not None:
            self._writing.result()

    def close(self) -> None:
        """Wait, then end the thread."""
        self._thread.shutdown()
        self.wait()

    def _write(self, content: dict[str, Any], target: Path) -> None:
        try:
            write(content, target)
            prune(self.run_dir, self.keep_last)
        except OSError as error:
            target.with_suffix(target.suffix + _UNFINISHED).unlink(missing_ok=True)
            raise OSError(
                f"checkpoint.{target.name} could not be written: {error.strerror or error}; those before it are whole: "
                f"make room or mend the disk, then python -m modernenc.resume {self.run_dir}"
            ) from error


def write(content: dict[str, Any], target: Path) -> None:
    """Write a checkpoint beside its target, sync it, rename it, then write its manifest."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(target.suffix + _UNFINISHED)
    with unfinished.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    size, digest = unfinished.stat().st_size, hash_file(unfinished)
    manifest_of(target).unlink(missing_ok=True)
    os.replace(unfinished, target)
    write_json(manifest_of(target), {"bytes": size, "xxh3_64": digest, **{key: content["state"][key] for key in POSITION}})


def read(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint, loaded without pickled code; ValueError, naming the file, when it is not whole."""
    check(checkpoint)
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint and its manifest."""
    manifest_of(checkpoint).unlink(missing_ok=True)
    checkpoint.unlink(missing_ok=True)


def manifest_of(checkpoint: Path) -> Path:
    """Where a checkpoint's manifest lies."""
    return checkpoint.with_suffix(".json")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Position, size and hash of a checkpoint; ValueError when it was not finished."""
    path = manifest_of(checkpoint)
    if not path.is_file():
        raise ValueError(f"{checkpoint} is not whole: {path.name} is missing beside it; take another checkpoint")
    return json.loads(path.read_text())


def check(checkpoint: Path) -> None:
    """Raise ValueError, naming the file, unless a checkpoint is whole."""
    manifest = read_manifest(checkpoint)
    size = checkpoint.stat().st_size
    if size != manifest["bytes"]:
        raise ValueError(f"{checkpoint} is not whole: {size} bytes, expected {manifest['bytes']}; take another checkpoint")
    if hash_file(checkpoint) != manifest["xxh3_64"]:
        raise ValueError(f"{checkpoint} is corrupt: its hash is not the one in {manifest_of(checkpoint).name}; take another")


def newest(run_dir: Path) -> Path | None:
    """The whole checkpoint of a run that has seen the most tokens; those that are not whole are passed over with a warning.

    None before the first one was written; FileNotFoundError when there are some, but none is whole.
    """
    folder = run_dir / FOLDER
    found = sorted(folder.glob("*.ckpt"), key=lambda path: (tokens_seen(path), path.stat().st_mtime_ns), reverse=True)
    if not found:
        return None
    for checkpoint in found:
        try:
            check(checkpoint)
        except ValueError as error:
            log.warning("passed over: %s", error)
        else:
            return checkpoint
    raise FileNotFoundError(f"{folder} holds no whole checkpoint; restore one, or start again with python -m modernenc.train")


def prune(run_dir: Path, keep_last: int) -> None:
    """Delete all but the last `keep_last` checkpoints between boundaries."""
    between = sorted((run_dir / FOLDER).glob("step-*.ckpt"), key=tokens_seen)
    for checkpoint in between[: max(0, len(between) - keep_last)]:
        remove(checkpoint)


def sweep(run_dir: Path) -> None:
    """Delete what a killed run left half written."""
    for unfinished in run_dir.rglob(f"*{_UNFINISHED}"):
        unfinished.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write a small file whole or not at all."""
    unfinished = path.with_suffix(path.suffix + _UNFINISHED)
    with unfinished.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def tokens_seen(checkpoint: Path) -> float:
    """Position by the manifest; a checkpoint without one counts as the newest, so that it is named in a warning."""
    manifest = manifest_of(checkpoint)
    return json.loads(manifest.read_text())["tokens_seen"] if manifest.is_file() else float("inf")
