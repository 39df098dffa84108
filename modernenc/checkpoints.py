"""Checkpoints: written whole or not at all, in the background, checked before they are trusted.

`checkpoints/end-of-<phase>.ckpt` at each boundary, `checkpoints/step-<step>.ckpt` between. Beside each lies a manifest of the
same name (`.json`) with size, hash and position, written last: a checkpoint without a matching one is not whole.

A checkpoint holds plain values and tensors by name: `weights`, `optimizers`, `state` (position, data), `run` (the
configuration). What is read is the same whatever the strategy and the number of ranks. Where ranks wrote their own shares of
it, those of ranks 1, 2, ... lie beside it as `<name>.1.part`, each with a manifest, and it is whole when all of one save are.

Lightning's own checkpoints are not used: they know optimizer states by position, differ between strategies, and are copied
out of $TMPDIR, which a kill can cut short (Lightning#21253). torch's distributed ones unpickle their metadata.
"""

import json
import logging
import math
import os
import shlex
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from modernenc.config import UNFINISHED, unfinished
from modernenc.hashing import hash_file

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
POSITION = ("tokens_seen", "step", "phase", "boundary")
_PART = ".part"


@dataclass(frozen=True)
class Share:
    """Which part of a checkpoint a rank writes."""

    rank: int
    ranks: int
    """How many ranks write one."""
    save: int
    """Number that the shares of one save have in common, and no other's."""


WHOLE = Share(rank=0, ranks=1, save=0)
"""All of a checkpoint in one file."""


class Writer:
    """Saves checkpoints of one run, one at a time, on a thread: training waits for the copy only.

    What goes wrong is raised by the next `save`, `check` or `close`, as OSError naming the file.
    """

    def __init__(self, run_dir: Path, keep_last: int) -> None:
        self.run_dir = run_dir
        self.keep_last = keep_last
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def save(self, content: dict[str, Any], name: str, share: Share) -> None:
        """Write a rank's share of a checkpoint, which no one else will change; waits for the one before."""
        self.wait()
        self._writing = self._thread.submit(self._write, content, self.run_dir / FOLDER / f"{name}.ckpt", share)

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

    def _write(self, content: dict[str, Any], target: Path, share: Share) -> None:
        write(content, target, share)
        if share.rank == 0:
            prune(self.run_dir, self.keep_last)


def write(content: dict[str, Any], target: Path, share: Share = WHOLE) -> None:
    """Write a rank's share of a checkpoint beside its target, sync it, rename it, then write its manifest.

    Raises OSError, naming the file, with nothing left of it.
    """
    path = _file(target, share.rank)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(path).open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        size, digest = unfinished(path).stat().st_size, hash_file(unfinished(path))
        manifest_of(path).unlink(missing_ok=True)
        os.replace(unfinished(path), path)
        manifest = {"bytes": size, "xxh3_64": digest, "save": share.save, "ranks": share.ranks}
        if share.rank == 0:
            position = {key: content["state"][key] for key in POSITION}
            manifest |= {**position, "rollbacks": content.get("run", {}).get("rollbacks", 0)}
        write_json(manifest_of(path), {**manifest, "sum": _sum(manifest)})
    except (OSError, RuntimeError) as error:  # the latter is torch.save's, which ends a file after a failed write
        unfinished(path).unlink(missing_ok=True)
        failed = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(
            f"checkpoint.{target.name} could not be written: {getattr(failed, 'strerror', None) or failed}; those before it "
            f"are whole: make room or mend the disk, then python -m modernenc.resume {shlex.quote(str(target.parent.parent))}"
        ) from error


def read(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint, loaded without pickled code; ValueError, naming the file, when it is not whole."""
    check(checkpoint)
    return _joined([torch.load(path, map_location="cpu", weights_only=True) for path in _shares(checkpoint)])


def files_of(checkpoint: Path) -> list[Path]:
    """What a checkpoint consists of, manifests first: without its own it is not taken for one."""
    parts = checkpoint.parent.glob(f"{checkpoint.stem}.*{_PART}")
    shares = [checkpoint, *(part for part in parts if _main(part) == checkpoint)]
    return [path for path in (*map(manifest_of, shares), *shares) if path.exists()]


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint."""
    for path in files_of(checkpoint):
        path.unlink()


def manifest_of(checkpoint: Path) -> Path:
    """Where a checkpoint's manifest lies."""
    return checkpoint.with_suffix(".json")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Position, size and hash of a checkpoint; ValueError when it was not finished, or the manifest is damaged."""
    path = manifest_of(checkpoint)
    if not path.is_file():
        raise ValueError(f"{checkpoint} is not whole: {path.name} is missing beside it; take another checkpoint")
    manifest: dict[str, Any] = {}
    try:
        manifest = json.loads(path.read_text())
        digest = manifest.pop("sum")
        whole = digest == _sum(manifest)
    except (ValueError, LookupError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{checkpoint} is not whole: {path.name} beside it is damaged; take another checkpoint")
    return manifest


def check(checkpoint: Path) -> None:
    """Raise ValueError, naming the file, unless a checkpoint is whole."""
    save = read_manifest(checkpoint)["save"]
    for path in _shares(checkpoint):
        manifest = read_manifest(path)
        if not path.is_file():
            raise ValueError(f"{checkpoint} is not whole: {path.name} is missing beside it; take another checkpoint")
        if manifest["save"] != save:
            raise ValueError(f"{checkpoint} is not whole: {path.name} is of another save; take another checkpoint")
        size = path.stat().st_size
        if size != manifest["bytes"]:
            raise ValueError(f"{path} is not whole: {size} bytes, expected {manifest['bytes']}; take another checkpoint")
        if hash_file(path) != manifest["xxh3_64"]:
            raise ValueError(f"{path} is corrupt: its hash is not the one in {manifest_of(path).name}; take another")


def newest(run_dir: Path) -> Path | None:
    """The whole checkpoint of a run that is the furthest; those that are not whole are passed over with a warning.

    None before the first one was written; FileNotFoundError when there are some, but none is whole.
    """
    folder = run_dir / FOLDER
    found = sorted(folder.glob("*.ckpt"), key=order, reverse=True)
    if not found:
        return None
    for checkpoint in found:
        try:
            check(checkpoint)
        except ValueError as error:
            log.warning("passed over: %s", error)
        else:
            return checkpoint
    raise FileNotFoundError(f"{folder} holds no whole checkpoint; restore one, or train again in another run_dir")


def prune(run_dir: Path, keep_last: int) -> None:
    """Delete all but the last `keep_last` checkpoints between boundaries; one that ranks still write is not counted."""
    between = sorted((run_dir / FOLDER).glob("step-*.ckpt"), key=order)
    finished = [checkpoint for checkpoint in between if _is_finished(checkpoint)]
    for checkpoint in between:
        if checkpoint not in finished[-keep_last:] and finished and order(checkpoint) < order(finished[-1]):
            remove(checkpoint)


def sweep(run_dir: Path) -> None:
    """Delete what a killed run left half written."""
    for left in run_dir.rglob(f"*{UNFINISHED}"):
        left.unlink()
    for part in (run_dir / FOLDER).glob(f"*{_PART}"):
        if not _main(part).exists():
            remove(part)


def write_json(path: Path, content: Any) -> None:
    """Write a small file whole or not at all."""
    with unfinished(path).open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished(path), path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def tokens_seen(checkpoint: Path) -> float:
    """Position by the manifest; a checkpoint without one counts as the furthest, so that it is named in a warning."""
    return order(checkpoint)[1]


def order(checkpoint: Path) -> tuple[float, float]:
    """Which of a run's checkpoints is further: that after more rollbacks, and of those the one that has seen more tokens."""
    try:
        manifest = read_manifest(checkpoint)
    except ValueError:
        return math.inf, math.inf
    return manifest["rollbacks"], manifest["tokens_seen"]


def _file(checkpoint: Path, rank: int) -> Path:
    """Where a rank's share of a checkpoint lies."""
    return checkpoint.with_suffix(f".{rank}{_PART}") if rank else checkpoint


def _shares(checkpoint: Path) -> list[Path]:
    return [_file(checkpoint, rank) for rank in range(read_manifest(checkpoint)["ranks"])]


def _main(part: Path) -> Path:
    """The checkpoint that a rank's share belongs to."""
    return part.with_suffix("").with_suffix(".ckpt")


def _is_finished(checkpoint: Path) -> bool:
    """Whether every rank has written its share, as far as manifests tell."""
    try:
        return len({read_manifest(path)["save"] for path in _shares(checkpoint)}) == 1
    except ValueError:
        return False


def _sum(manifest: dict[str, Any]) -> str:
    """Hash of a manifest's own content."""
    return xxhash.xxh3_64_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _joined(shares: list[Any]) -> Any:
    """One content from the ranks' shares: tensors that several hold are split between them along the first dimension."""
    first = shares[0]
    if len(shares) == 1:
        return first
    if isinstance(first, dict):
        return {key: _joined([share[key] for share in shares if key in share]) for key in first}
    if isinstance(first, list):
        return [_joined(list(items)) for items in zip(*shares, strict=True)]
    return torch.cat(shares)
