"""The history of a run: `lineage.json`, with one entry per start, resume, rollback and branch, in order.

An entry holds an event, the position at which it happened, when it happened, and on how many ranks and with which versions.
"""

import fcntl
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import modernenc
from modernenc.atomic import write_json
from modernenc.expected import NUMBER, parse

LINEAGE = "lineage.json"
ABANDONED = "abandoned"
"""Folder in a run folder that holds, by number, what its rollbacks abandoned."""
EVENTS = ("start", "resume", "rollback", "branch", "branched")
_ENTRY = {
    "event": str, "checkpoint": str, "changed?": [str], "skipped_tokens?": NUMBER, "abandoned?": str, "into?": str,
    "tokens_seen": NUMBER, "time": str, "versions": {str: str}, "threads": NUMBER, "ranks": range(1, 1 << 31),
}  # fmt: skip
_ALSO = {"rollback": ("abandoned",), "branched": ("into",)}
"""Keys that an entry of an event has, too."""


@dataclass
class Event:
    """An event in the history of a run: its start, a resume, a rollback, a branch, or a branch that left it."""

    event: str
    """start, resume, rollback or branch; in the history of a parent, branched."""
    checkpoint: str = ""
    """Checkpoint that it goes on from; empty at the start. A branch names the path, the others the stem."""
    changed: list[str] | None = None
    """Settings that a rollback changes, as KEY=VALUE."""
    skipped_tokens: int | None = None
    """Tokens of row capacity that a rollback skips."""
    abandoned: str | None = None
    """Folder, relative to the run's, of what a rollback abandons."""
    into: str | None = None
    """Folder of the branch, in the history of its parent."""

    def plain(self) -> dict[str, Any]:
        """Return the event as plain values, without what does not apply to it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return all entries so far; ValueError, naming the file, if it is damaged, or names a folder outside the run's."""
    path = run_dir / LINEAGE
    if not path.exists():
        return []
    remedy = "restore it from a copy"
    entries = parse(path.read_bytes(), [_ENTRY], str(path), remedy)
    for number, entry in enumerate(entries):
        missing = [key for key in _ALSO.get(entry["event"], ()) if key not in entry]
        if entry["event"] not in EVENTS or missing:
            raise ValueError(f"{path}: [{number}] is no event, or lacks {', '.join(missing) or 'its name'}; {remedy}")
        if not re.fullmatch(rf"{ABANDONED}/\d+", entry.get("abandoned", f"{ABANDONED}/1")):
            raise ValueError(f"{path}: [{number}].abandoned is {entry['abandoned']}, expected {ABANDONED}/NUMBER; {remedy}")
    return entries


def write(run_dir: Path, entries: list[dict[str, Any]]) -> None:
    """Write all entries, whole or not at all."""
    write_json(run_dir / LINEAGE, entries)


def add(run_dir: Path, event: Event, ranks: int, tokens_seen: int) -> None:
    """Append an entry for an event that happens now, on `ranks` ranks, after `tokens_seen` tokens."""
    entry = {
        **event.plain(),
        "tokens_seen": tokens_seen,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
    }
    with _locked(run_dir):
        write(run_dir, [*read(run_dir), entry])


def versions() -> dict[str, str]:
    """Return the versions that numerical results may depend on, by name."""
    others = {name: version(name) for name in ("lightning", "numpy")}
    return {"modernenc": modernenc.__version__, "python": platform.python_version(), "torch": str(torch.__version__), **others}


def describe_versions(of: dict[str, str]) -> str:
    """Return versions of programs, as `versions` gives them, as one line of text."""
    return ", ".join(f"{name} {number}" for name, number in of.items())


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold a lock on the folder, since several branches of one run may add entries at once; file systems may lack locks."""
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
