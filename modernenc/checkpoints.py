"""Checkpoints: written whole or not at all, checked before they are trusted.

`checkpoints/end-of-<phase>.ckpt` at each boundary, `checkpoints/step-<step>.ckpt` between. Beside each lies a manifest of the
same name (`.json`) with size, hash and position, written last: a checkpoint without a matching one is not whole.
Lightning's own writer makes its temporary file in $TMPDIR and copies it, which a kill can cut short (Lightning#21253).
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from modernenc.hashing import hash_file

log = logging.getLogger(__name__)

STATE_KEY = "modernenc"
"""Where our own state lies in a Lightning checkpoint."""


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoints, written beside the target, synced, renamed; loaded without pickled code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint and its manifest."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        manifest_of(target).unlink(missing_ok=True)
        unfinished = target.with_suffix(".ckpt.tmp")
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        size, digest = unfinished.stat().st_size, hash_file(unfinished)
        os.replace(unfinished, target)
        position = {key: checkpoint[STATE_KEY][key] for key in ("tokens_seen", "step", "phase", "boundary")}
        write_json(manifest_of(target), {"bytes": size, "xxh3_64": digest, **position})

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; ValueError, naming the file, when it is not whole."""
        check(Path(path))
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint and its manifest."""
        manifest_of(Path(path)).unlink(missing_ok=True)
        Path(path).unlink(missing_ok=True)


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


def newest(run_dir: Path) -> Path:
    """The whole checkpoint of a run that has seen the most tokens; those that are not whole are passed over with a warning.

    Raises FileNotFoundError when there is none.
    """
    folder = run_dir / "checkpoints"
    by_time = sorted(folder.glob("*.ckpt"), key=_tokens_seen, reverse=True)
    for checkpoint in by_time:
        try:
            check(checkpoint)
        except ValueError as error:
            log.warning("passed over: %s", error)
        else:
            return checkpoint
    raise FileNotFoundError(f"{folder} holds no whole checkpoint; start again with python -m modernenc.train")


def prune(run_dir: Path, keep_last: int) -> None:
    """Delete all but the last `keep_last` checkpoints between boundaries."""
    between = sorted((run_dir / "checkpoints").glob("step-*.ckpt"), key=_tokens_seen)
    for checkpoint in between[: max(0, len(between) - keep_last)]:
        AtomicCheckpointIO().remove_checkpoint(checkpoint)


def write_json(path: Path, content: Any) -> None:
    """Write a small file whole or not at all."""
    unfinished = path.with_suffix(path.suffix + ".tmp")
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


def _tokens_seen(checkpoint: Path) -> float:
    """Position by the manifest; a checkpoint without one counts as the newest, so that it is named in a warning."""
    manifest = manifest_of(checkpoint)
    return json.loads(manifest.read_text())["tokens_seen"] if manifest.is_file() else float("inf")
