"""Where a run came from: `lineage.json`, one entry per start, resume, rollback and branch, in order.

An entry says what happened (`event`), from which checkpoint and position, when, on how many ranks, and with what versions;
a rollback also what it changed, what it skipped and where the steps that it gave up lie; a branch whose child it is.
"""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modernenc

LINEAGE = "lineage.json"


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All entries so far."""
    path = run_dir / LINEAGE
    return json.loads(path.read_text()) if path.exists() else []


def write(run_dir: Path, entries: list[dict[str, Any]]) -> None:
    """Write all entries, whole or not at all."""
    from modernenc.checkpoints import write_json

    write_json(run_dir / LINEAGE, entries)


def add(run_dir: Path, event: dict[str, Any], ranks: int, tokens_seen: int) -> None:
    """Append an entry."""
    import torch  # seconds to import, which a reader need not pay for

    entry = {
        **event,
        "tokens_seen": tokens_seen,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
    }
    with _alone(run_dir):
        write(run_dir, [*read(run_dir), entry])


def versions() -> dict[str, str]:
    """What numbers may depend on, by name; ask after torch was imported, or pay for it."""
    import torch

    others = {name: version(name) for name in ("lightning", "numpy")}
    return {"modernenc": modernenc.__version__, "python": platform.python_version(), "torch": str(torch.__version__), **others}


def described(of: dict[str, str]) -> str:
    """Versions in words."""
    return ", ".join(f"{name} {number}" for name, number in of.items())


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Keep others from adding meanwhile, as branches of one run do at once; not where the file system has no locks."""
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
