"""The history of a run: `lineage.json`, with one entry per start, resume, rollback and branch, in order.

An entry holds an event, the position at which it happened, when it happened, and on how many ranks and with which versions.
"""

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import modernenc
from modernenc.atomic import read_json, write_json

LINEAGE = "lineage.json"


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
    """Return all entries so far; ValueError if the file is damaged."""
    path = run_dir / LINEAGE
    return read_json(path) if path.exists() else []


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
