"""Steps from a process of their own: one pipe, and a thread that receives ahead of the trainer.

A step crosses as a few arrays through the pipe, so that neither shared memory nor open files grow with its micro-batches.
"""

import atexit
import ctypes
import multiprocessing
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from modernenc.data.loader import Step, Steps

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What asks a run to save and stop."""
_PR_SET_PDEATHSIG = 1  # of prctl(2)


class StepLoader:
    """Whole steps, made in this process (no worker) or ahead of it (one).

    Raises what the worker raises, and ChildProcessError when it is no more.
    """

    def __init__(self, steps: Steps, workers: int, pin_memory: bool) -> None:
        self.steps = steps
        self.workers = workers
        self.pin_memory = pin_memory

    def __len__(self) -> int:
        """Endless: tokens end a run. Lightning reads a loader without a length one item ahead of training."""
        return 10**12

    def __iter__(self) -> Iterator[Step]:
        """Make steps."""
        if self.workers:
            return _ahead(self.steps, torch.cuda.current_device() if self.pin_memory else None)
        return (step.pin_memory() for step in self.steps) if self.pin_memory else iter(self.steps)


def _ahead(steps: Steps, pin_for: int | None) -> Iterator[Step]:
    """The steps that a process makes and a thread receives: two have come at most, one waits or is being made."""
    reads, writes = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.Process(target=_make, args=(steps, reads, writes), name="loader", daemon=True)
    # A signal to stop is for the trainer alone: a worker that ended first would look like a failure.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        worker.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    writes.close()
    atexit.register(worker.kill)  # Python would wait for it
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()
    room = threading.Semaphore(2)
    threading.Thread(target=_receive, args=(reads, received, room, pin_for), name="loader", daemon=True).start()
    try:
        while isinstance(item := received.get(), Step):
            room.release()
            yield item
        if isinstance(item, Exception):
            raise item
        if item == _ENDED:
            worker.join(10)
            raise ChildProcessError(_how_it_ended(worker.exitcode))
    finally:
        worker.kill()
        worker.join(10)
        room.release()
        atexit.unregister(worker.kill)


_DONE, _ENDED = "done", "ended"


def _make(steps: Steps, reads: Connection, writes: Connection) -> None:
    """Send the steps and that they are done, or what is wrong with the data: what the worker does."""
    reads.close()  # a fork left it open: without a reader a write fails, so that a worker ends with its trainer
    _follow_the_trainer()
    try:
        for step in steps:
            writes.send(step)
        writes.send(_DONE)
    except BrokenPipeError:
        return
    except (ValueError, OSError) as error:
        writes.send(error)


def _receive(reads: Connection, received: "queue.SimpleQueue[Any]", room: threading.Semaphore, pin_for: int | None) -> None:
    """Take what the worker sends, so that it need not wait for the trainer; whatever happens, the trainer is told."""
    try:
        if pin_for is not None:
            torch.cuda.set_device(pin_for)
        while True:
            room.acquire()
            item = reads.recv()
            received.put(item.pin_memory() if pin_for is not None and isinstance(item, Step) else item)
    except EOFError:
        return
    finally:
        reads.close()
        received.put(_ENDED)


def _how_it_ended(code: int | None) -> str:
    """What to tell of a worker that is no more."""
    how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
    why = ", as when there is not enough memory" if code == -signal.SIGKILL else ", as its own lines say"
    return (
        f"data.workers=1: the loader process {how}{why}; what was saved is whole: go on, with data.workers=0 if this happens "
        "again, by python -m modernenc.resume"
    )


def _follow_the_trainer() -> None:
    """End with the trainer, and not before it.

    A worker that outlived a killed trainer would hold its connections open, and other ranks would wait for it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
