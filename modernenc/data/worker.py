"""The loader process: it makes steps ahead of the trainer and sends them through one pipe.

A step crosses the pipe as arrays, so neither shared memory nor the number of open files grows with its micro-batches.
A thread of the trainer receives, so the process can send a step while the trainer is busy with the one before.
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
from modernenc.exit_codes import STOP_SIGNALS

_AHEAD = 2
"""Number of steps that may lie received in the trainer; one more is being made or waits in the pipe."""
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_DONE, _ENDED = "done", "ended"
"""Items in place of a step: the curriculum is over; the loader process is gone."""


class StepLoader:
    """An iterable of whole steps, made in this process (`workers=0`) or ahead of it in another one (`workers=1`).

    Iterating raises what making the steps raises, ChildProcessError when the loader process ends before its time, and
    TimeoutError when it gives nothing for `timeout_s`.
    """

    def __init__(self, steps: Steps, workers: int, pin_memory: bool, timeout_s: float = 900) -> None:
        self.steps = steps
        self.workers = workers
        self.pin_memory = pin_memory
        self.timeout_s = timeout_s

    def __len__(self) -> int:
        """Return a number that no run reaches: a run ends by its tokens.

        Lightning reads a loader without a length one item ahead of training.
        """
        return 10**12

    def __iter__(self) -> Iterator[Step]:
        """Yield the steps."""
        if self.workers:
            pin_for = torch.cuda.current_device() if self.pin_memory else None
            return _receive_steps(self.steps, pin_for, self.timeout_s)
        return (step.pin_memory() for step in self.steps) if self.pin_memory else iter(self.steps)


def _receive_steps(steps: Steps, pin_for: int | None, timeout_s: float) -> Iterator[Step]:
    """Start a loader process and yield its steps, pinned for the CUDA device `pin_for` if there is one.

    Raises TimeoutError if it gives none for `timeout_s`.
    """
    reads, writes = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.Process(target=_send_steps, args=(steps, reads, writes), name="loader", daemon=True)
    # A signal to stop is meant for the trainer alone: if the worker ended first, the run would take that for a failure. The
    # worker inherits this mask, and then ignores the signals.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        worker.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    writes.close()
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()
    room = threading.Semaphore(_AHEAD)
    over = threading.Event()
    thread = threading.Thread(target=_fill_queue, args=(reads, received, room, over, pin_for), name="loader", daemon=True)
    thread.start()

    def end() -> None:
        """End the worker, and then the thread, which waits for the pipe or for room."""
        worker.kill()
        worker.join(10)
        over.set()
        room.release()
        thread.join(10)

    # At exit Python would wait for the worker, which may wait for room in the pipe; and a thread that is amid a tensor when the
    # interpreter goes aborts the process.
    atexit.register(end)
    try:
        while isinstance(item := received.get(timeout=timeout_s), Step):
            room.release()
            yield item
        if isinstance(item, Exception):
            raise item
        if item == _ENDED:
            worker.join(10)
            raise ChildProcessError(_death_message(worker.exitcode))
    except queue.Empty:
        raise TimeoutError(
            f"data.loader_timeout_s={timeout_s:g}: the loader process gave no step for so long, as when a disk or a network "
            "does not answer; raise it, or train with data.workers=0 to see where it waits"
        ) from None
    finally:
        end()
        atexit.unregister(end)


def _send_steps(steps: Steps, reads: Connection, writes: Connection) -> None:
    """Run the loader process: send all steps, then `_DONE`, or the error that the data raise.

    The process ends when the trainer ends, and not before: a worker that outlives a killed trainer would keep its network
    connections open, and other ranks would wait for it.
    """
    # A fork leaves the reading end open here too. Closed, the pipe has no reader once the trainer is gone, so that a write
    # fails and the worker ends.
    reads.close()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        for step in steps:
            writes.send(step)
        writes.send(_DONE)
    except BrokenPipeError:
        return
    except (ValueError, OSError) as error:
        writes.send(error)


def _fill_queue(
    reads: Connection, received: "queue.SimpleQueue[Any]", room: threading.Semaphore, over: threading.Event, pin_for: int | None
) -> None:
    """Move items from the pipe to the queue, at most `_AHEAD` steps ahead, until all is over; the last item is `_ENDED`."""
    try:
        if pin_for is not None:
            torch.cuda.set_device(pin_for)
        while room.acquire() and not over.is_set():
            item = reads.recv()
            received.put(item.pin_memory() if pin_for is not None and isinstance(item, Step) else item)
    except (EOFError, OSError):  # the worker ended between two steps, or amid one
        return
    finally:
        reads.close()
        received.put(_ENDED)


def _death_message(code: int | None) -> str:
    """Describe to the user how the loader process ended, and what to do."""
    how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
    why = ", as when there is not enough memory" if code == -signal.SIGKILL else ", as its own output says"
    return (
        f"data.workers=1: the loader process {how}{why}; saved checkpoints are whole: go on with python -m modernenc.resume "
        "RUN_DIR, with data.workers=0 if this happens again"
    )
