"""Locks on files: one process at a time trains a run, or does a part of an evaluation; the kernel frees them when it ends."""

import errno
import fcntl
import logging
import time
from pathlib import Path
from typing import IO

log = logging.getLogger("modernenc")

LOG = "log.txt"
_WAIT_S = 5
"""How long to wait for another process that holds the lock: the workers of a killed process take a moment to end."""


def acquire(file: IO[str], run_dir: Path) -> bool:
    """Lock a run's log file and return whether that took a wait; ValueError if another process trains the run."""
    for attempt in range(_WAIT_S * 10):
        if try_acquire(file, run_dir):
            return attempt > 0
        time.sleep(0.1)
    raise ValueError(f"run_dir={run_dir} is being trained by another process; wait for it or end it")


def acquire_within(file: IO[str], folder: Path) -> None:
    """Lock a file, and wait as long as other processes hold the lock."""
    while not try_acquire(file, folder):
        time.sleep(0.1)


def try_acquire(file: IO[str], folder: Path) -> bool:
    """Lock a file without a wait, and return whether this process holds the lock now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        log.warning("%s is on a file system without locks: make sure that only one process works in it", folder)
    return True
