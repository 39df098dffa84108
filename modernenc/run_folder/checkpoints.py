"""Checkpoints: written whole or not at all, in the background, and verified before they are trusted.

`checkpoints/end-of-<phase>.ckpt` is written at each phase boundary, `checkpoints/step-<step>.ckpt` between boundaries,
`branch.ckpt` and `rollback-<number>.ckpt` where a branch or a rollback starts. A manifest of the same name (`.json`) with size,
hash and position is written last: a checkpoint without a matching one is not whole.

What is read is the same whatever strategy and number of ranks wrote it. If ranks wrote their own shards, the shards of ranks 1,
2, ... lie beside the checkpoint as `<name>.1.part`, ..., each with a manifest, and the checkpoint is whole if all shards of one
save are.

Lightning's own checkpoints are not used: they identify optimizer states by position, differ between strategies, and are copied
out of $TMPDIR, which a kill can interrupt (Lightning#21253). torch's distributed checkpoints unpickle their metadata.
"""

import json
import logging
import math
import os
import shlex
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash

from modernenc import ranges
from modernenc.atomic import PARTIAL_SUFFIX, partial_path, write_json
from modernenc.expected import NUMBER, parse
from modernenc.hashing import hash_file
from modernenc.run_folder.lineage import Event

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
BRANCH = "branch"
"""Name of the checkpoint that a branch starts from."""
POSITION = ("tokens_seen", "step", "phase", "boundary")
"""What a manifest says about the position of a checkpoint."""
_SHARD_SUFFIX = ".part"
_SHARD_MANIFEST = {"bytes": NUMBER, "xxh3_64": str, "save": range(1 << 63), "ranks": range(1, 1 << 16), "sum": str}
_MANIFEST = {
    **_SHARD_MANIFEST, "tokens_seen": NUMBER, "step": NUMBER, "phase": str, "boundary": bool, "rollbacks": NUMBER,
}  # fmt: skip


def name_at_end(phase: str) -> str:
    """Return the name of the checkpoint at the end of a phase."""
    return f"end-of-{phase}"


def name_at_step(step: int | str) -> str:
    """Return the name of the checkpoint after a step between boundaries; `*` gives the pattern of all such names."""
    return f"step-{step:08d}" if isinstance(step, int) else f"step-{step}"


def start_of_rollback(number: int) -> str:
    """Return the name of the checkpoint that a rollback starts from."""
    return f"rollback-{number}"


@dataclass
class UnloggedMetrics:
    """Metrics of one objective's steps since the last row of `metrics.csv`."""

    tokens_seen: int
    """Position at the start of the last of these steps."""
    losses: list[float]
    """Summed loss of each rank."""
    targets: int
    grad_norm: float
    skipped: int
    """Steps that were skipped."""

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "UnloggedMetrics":
        """Return the metrics that plain values describe, whose loss and norm may be infinite, or not a number."""
        ranges.check("unlogged", cls, cls(**{**values, "losses": [], "grad_norm": 0.0}))
        return cls(**{**values, "losses": [float(loss) for loss in values["losses"]], "grad_norm": float(values["grad_norm"])})


@dataclass
class TrainState:
    """The position of a run, and what its numbers may depend on."""

    tokens_seen: int
    step: int
    phase: str
    """Phase of the last step."""
    boundary: bool
    """Whether the phase ends exactly here."""
    seconds: float
    """Time spent training, over all resumes."""
    skipped_steps: int
    """Steps in a row, up to here, that were skipped."""
    skipped_since: int
    """Position before the first of them."""
    norms: dict[str, list[float]]
    """Gradient norms of the last steps of this phase, by objective, where large ones are skipped."""
    unlogged: dict[str, UnloggedMetrics]
    """By objective."""
    data: dict[str, Any]
    """State of the data after the last step (`modernenc.data.loader.DataState`) as plain values."""
    corpus: str
    """Fingerprint of the corpus."""
    tasks: dict[str, str]
    """Fingerprints of the tasks' training files."""
    ranks: int
    threads: int
    versions: dict[str, str]


@dataclass
class Checkpoint:
    """All that a run needs to go on. Ranks other than the first write a shard that holds tensors only."""

    weights: dict[str, torch.Tensor]
    """Tensors by name."""
    optimizers: list[dict[str, Any]]
    """State of each optimizer by parameter name."""
    state: TrainState
    run: dict[str, Any]
    """The configuration as plain values."""
    event: Event = field(default_factory=lambda: Event("resume"))
    """How the run goes on from here: differs from a resume where a rollback starts."""

    @classmethod
    def from_plain(cls, content: dict[str, Any]) -> "Checkpoint":
        """Return the checkpoint that plain values describe; ValueError if they were written by an older version."""
        expected = {one.name for one in fields(cls)}
        state = content.get("state", {})
        if content.keys() != expected or state.keys() != {one.name for one in fields(TrainState)}:
            raise ValueError("it was written by another version of modernenc, whose checkpoints this one cannot read")
        unlogged = {objective: UnloggedMetrics.from_plain(metrics) for objective, metrics in state["unlogged"].items()}
        event = Event(**content["event"])
        checkpoint = cls(**{**content, "state": TrainState(**{**state, "unlogged": unlogged}), "event": event})
        ranges.check("", cls, replace(checkpoint, state=replace(checkpoint.state, unlogged={})))
        ranges.check("run.rollbacks", int, checkpoint.run["rollbacks"])
        for name, weight in checkpoint.weights.items():
            if not isinstance(weight, torch.Tensor):
                raise ValueError(f"{name} is no tensor")
        return checkpoint

    def plain(self) -> dict[str, Any]:
        """Return the content as plain values and tensors, which need no pickled code."""
        unlogged = {objective: asdict(metrics) for objective, metrics in self.state.unlogged.items()}
        return {**vars(self), "state": {**vars(self.state), "unlogged": unlogged}, "event": asdict(self.event)}


@dataclass(frozen=True)
class RankShard:
    """Which part of a checkpoint a rank writes."""

    rank: int
    ranks: int
    """Number of ranks that write a shard."""
    save: int
    """Number that the shards of one save have in common, and no other save's."""


UNSHARDED = RankShard(rank=0, ranks=1, save=0)
"""The whole checkpoint in one file."""

Content = Checkpoint | dict[str, Any]
"""What a rank writes: the first one a checkpoint, the others the tensors of their shard."""


class CheckpointWriter:
    """Saves the checkpoints of one run, one at a time, on a thread, so that training only waits for the copy.

    A failure is raised by the next `save`, `check` or `close`, as OSError naming the file.
    """

    def __init__(self, run_dir: Path, keep_last: int) -> None:
        self.run_dir = run_dir
        self.keep_last = keep_last
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def save(self, content: Content, name: str, shard: RankShard, unstable_since: int | None = None) -> None:
        """Write a rank's shard of a checkpoint, whose content nobody changes afterwards; waits for the save before.

        The last checkpoint up to `unstable_since`, if that is given, is not pruned.
        """
        self.wait()
        target = self.run_dir / FOLDER / f"{name}.ckpt"
        self._writing = self._thread.submit(self._write, content, target, shard, unstable_since)

    def check(self) -> None:
        """Raise the failure of the last save, if it has failed by now."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def wait(self) -> None:
        """Return when the last save is on disk."""
        if self._writing is not None:
            self._writing.result()

    def close(self) -> None:
        """Wait for the last save, then end the thread."""
        self._thread.shutdown()
        self.wait()

    def _write(self, content: Content, target: Path, shard: RankShard, unstable_since: int | None) -> None:
        write(content, target, shard)
        if shard.rank == 0:
            prune(self.run_dir, self.keep_last, unstable_since)


def write(content: Content, target: Path, shard: RankShard = UNSHARDED) -> None:
    """Write a rank's shard of a checkpoint beside its target, sync it, rename it, then write its manifest.

    Raises OSError, naming the file, and leaves nothing of it behind; ValueError, before anything is written or pruned, if
    weights are not finite.
    """
    path = _file(target, shard.rank)
    check_finite(content.weights if isinstance(content, Checkpoint) else content.get("weights", {}), str(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial_path(path).open("wb") as file:
            torch.save(content.plain() if isinstance(content, Checkpoint) else content, file)
            file.flush()
            os.fsync(file.fileno())
        size, digest = partial_path(path).stat().st_size, hash_file(partial_path(path))
        manifest_of(path).unlink(missing_ok=True)
        os.replace(partial_path(path), path)
        manifest = {"bytes": size, "xxh3_64": digest, "save": shard.save, "ranks": shard.ranks}
        if isinstance(content, Checkpoint):
            position = {key: getattr(content.state, key) for key in POSITION}
            manifest |= {**position, "rollbacks": content.run["rollbacks"]}
        write_json(manifest_of(path), {**manifest, "sum": _hash_of(manifest)})
    except (OSError, RuntimeError) as error:  # torch.save ends a file after a failed write, and raises RuntimeError
        with suppress(OSError):
            partial_path(path).unlink()
        failed = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(
            f"{target} could not be written: {getattr(failed, 'strerror', None) or failed}; the checkpoints before it are "
            f"whole: make room or mend the disk, then python -m modernenc.resume {shlex.quote(str(target.parent.parent))}"
        ) from error


def read(checkpoint: Path) -> Checkpoint:
    """Return a checkpoint, loaded without pickled code.

    Raises ValueError, naming the file, if it is not whole, its weights are not finite, or another version wrote it.
    """
    check(checkpoint)
    shards = [_load(path) for path in _shards_of(checkpoint)]
    try:
        content = Checkpoint.from_plain(_join(shards))
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{checkpoint}: {' '.join(str(error).split())}; go on with the version that wrote it") from error
    check_finite(content.weights, str(checkpoint))
    return content


def _load(path: Path) -> Any:
    """Return the content of one file, loaded without pickled code; ValueError, naming it, if it is none of torch's."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of damage below the hash, which somebody made on purpose, torch raises any class
        raise ValueError(f"{path} is no checkpoint: {' '.join(str(error).split())[:200]}; take another") from error


def check_finite(weights: dict[str, Any], where: str) -> None:
    """Raise ValueError if a weight is infinite or not a number; `where` names the file that holds, or would hold, it."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f"{where}: {name} is not finite, so no model can be made of it; go back to an earlier checkpoint")


def files_of(checkpoint: Path) -> list[Path]:
    """Return all files of a checkpoint, manifests first, because data without a manifest is not a checkpoint."""
    parts = checkpoint.parent.glob(f"{checkpoint.stem}.*{_SHARD_SUFFIX}")
    shards = [checkpoint, *(part for part in parts if _checkpoint_of(part) == checkpoint)]
    return [path for path in (*map(manifest_of, shards), *shards) if path.exists()]


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint."""
    for path in files_of(checkpoint):
        path.unlink()


def is_finished(checkpoint: Path) -> bool:
    """Return whether every rank has written its shard, judging by the manifests."""
    try:
        return len({read_manifest(path)["save"] for path in _shards_of(checkpoint)}) == 1
    except ValueError:
        return False


def manifest_of(checkpoint: Path) -> Path:
    """Return the path of a checkpoint's manifest."""
    return checkpoint.with_suffix(".json")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return position, size and hash of a checkpoint; ValueError if it was not finished, or the manifest is damaged."""
    path = manifest_of(checkpoint)
    if not path.is_file():
        raise ValueError(f"{checkpoint} is not whole: {path.name} is missing beside it; take another checkpoint")
    shape = _SHARD_MANIFEST if checkpoint.suffix == _SHARD_SUFFIX else _MANIFEST
    try:
        manifest = parse(path.read_bytes(), shape, path.name, "take another checkpoint")
        if manifest.pop("sum") != _hash_of(manifest):
            raise ValueError(f"{path.name} has another content than its hash says; take another checkpoint")
    except ValueError as error:
        raise ValueError(f"{checkpoint} is not whole: {path.name} beside it is damaged: {error}") from error
    return manifest


def check(checkpoint: Path) -> None:
    """Raise ValueError, naming the file, unless a checkpoint is whole."""
    save = read_manifest(checkpoint)["save"]
    for path in _shards_of(checkpoint):
        manifest = read_manifest(path)
        if not path.is_file():
            raise ValueError(f"{checkpoint} is not whole: {path.name} is missing beside it; take another checkpoint")
        if manifest["save"] != save:
            raise ValueError(f"{checkpoint} is not whole: {path.name} is of another save; take another checkpoint")
        size = path.stat().st_size
        if size != manifest["bytes"]:
            raise ValueError(f"{path} is not whole: {size} bytes, expected {manifest['bytes']}; take another checkpoint")
        if _hash_once(path, path.stat().st_mtime_ns, size) != manifest["xxh3_64"]:
            raise ValueError(f"{path} is corrupt: its hash is not the one in {manifest_of(path).name}; take another")


def newest(run_dir: Path) -> Path | None:
    """Return the furthest whole checkpoint of a run, with a warning about each further one that is not whole.

    Returns None if no checkpoint was finished yet; raises FileNotFoundError if there are some, but none is whole.
    """
    folder = run_dir / FOLDER
    found = sorted(folder.glob("*.ckpt"), key=sort_key, reverse=True)
    for checkpoint in found:
        try:
            check(checkpoint)
        except ValueError as error:
            log.warning("skipped: %s", error)
        else:
            return checkpoint
    if not found or (len(found) == 1 and not manifest_of(found[0]).exists()):  # the first, which a kill cut short
        return None
    raise FileNotFoundError(f"{folder} holds no whole checkpoint; restore one, or train again in another run_dir")


def last_until(run_dir: Path, tokens: int) -> Path | None:
    """Return the furthest finished checkpoint of a run up to a position, of those at one position the last rollback's."""
    found = [path for path in (run_dir / FOLDER).glob("*.ckpt") if is_finished(path) and tokens_seen(path) <= tokens]
    return max(found, key=lambda path: (tokens_seen(path), sort_key(path), path.name), default=None)


def prune(run_dir: Path, keep_last: int, unstable_since: int | None = None) -> None:
    """Delete all but the last `keep_last` checkpoints between boundaries; one that ranks still write does not count.

    The last one up to `unstable_since`, if that is given, stays: what came after may be of no use.
    """
    good = None if unstable_since is None else last_until(run_dir, unstable_since)
    between = sorted((run_dir / FOLDER).glob(f"{name_at_step('*')}.ckpt"), key=sort_key)
    finished = [checkpoint for checkpoint in between if is_finished(checkpoint)]
    for checkpoint in between:
        if checkpoint not in [*finished[-keep_last:], good] and finished and sort_key(checkpoint) < sort_key(finished[-1]):
            remove(checkpoint)


def remove_partial(run_dir: Path) -> None:
    """Delete files that a killed run left unfinished, and shards without a checkpoint."""
    for folder in (run_dir, run_dir / FOLDER):
        for left in folder.glob(f"*.*[0-9]{PARTIAL_SUFFIX}"):
            left.unlink()
    for part in (run_dir / FOLDER).glob(f"*{_SHARD_SUFFIX}"):
        if not _checkpoint_of(part).exists():
            remove(part)


def tokens_seen(checkpoint: Path) -> float:
    """Return the position in the manifest; without one, infinity, so that a warning will name the checkpoint."""
    return sort_key(checkpoint)[1]


def sort_key(checkpoint: Path) -> tuple[float, float]:
    """Return the number of rollbacks, then the tokens seen: the further of two checkpoints of a run has the larger key."""
    try:
        manifest = read_manifest(checkpoint)
    except ValueError:
        return math.inf, math.inf
    return manifest["rollbacks"], manifest["tokens_seen"]


@lru_cache
def _hash_once(path: Path, mtime_ns: int, size: int) -> str:
    """Return the hash of a file, which is computed once in a process as long as the file does not change."""
    return hash_file(path)


def _file(checkpoint: Path, rank: int) -> Path:
    """Return the file of a rank's shard of a checkpoint."""
    return checkpoint.with_suffix(f".{rank}{_SHARD_SUFFIX}") if rank else checkpoint


def _shards_of(checkpoint: Path) -> list[Path]:
    return [_file(checkpoint, rank) for rank in range(read_manifest(checkpoint)["ranks"])]


def _checkpoint_of(shard: Path) -> Path:
    """Return the checkpoint that a rank's shard belongs to."""
    return shard.with_suffix("").with_suffix(".ckpt")


def _hash_of(manifest: dict[str, Any]) -> str:
    """Return the hash of a manifest's own content, which shows damage to the manifest itself."""
    return xxhash.xxh3_64_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _join(shards: list[Any]) -> Any:
    """Return one content from the ranks' shards: tensors are split between ranks along the first dimension."""
    first = shards[0]
    if len(shards) == 1:
        return first
    if isinstance(first, dict):
        return {key: _join([shard[key] for shard in shards if key in shard]) for key in first}
    if isinstance(first, list):
        return [_join(list(items)) for items in zip(*shards, strict=True)]
    return torch.cat(shards)
