"""Work that several processes share through a folder: whoever holds the lock on a piece of work does it.

The kernel releases a lock however its process ends, so that a killed one leaves nothing behind but work to be done.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modernenc.run_folder.lock import acquire_within, try_acquire

LOCKS = "locks"


@contextmanager
def claim(work: Path) -> Iterator[bool]:
    """Yield whether this process may do the work that makes a file or a folder, which is so while no other one does it."""
    with _lock_file(work).open("w") as file:
        yield try_acquire(file, work.parent)


@contextmanager
def wait_for(work: Path) -> Iterator[None]:
    """Wait until no other process does this work, and keep others from it."""
    with _lock_file(work).open("w") as file:
        acquire_within(file, work.parent)
        yield


def _lock_file(work: Path) -> Path:
    folder = work.parent / LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{work.name}.lock"
