"""Steps that go wrong or never end, for a loader process to make; in a module that any process can import."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import torch

from modernenc.data.batch import MicroBatch
from modernenc.data.loader import Step


def marked(number: int) -> Step:
    """Return a step that is recognised by its number of targets."""
    nothing = torch.zeros(1, dtype=torch.int64)
    return Step([MicroBatch(nothing, torch.zeros(2, dtype=torch.int32), 1, nothing, nothing, 1, 0)], number, 0, {})


class Ends:
    """Steps that go wrong after the first, each in its own way."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __iter__(self) -> Iterator[Step]:
        """Make a step, then go wrong."""
        yield marked(0)
        match self.how:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "a signal to stop":
                os.kill(os.getpid(), signal.SIGTERM)
                yield marked(1)
            case "a mistake in the data":
                raise ValueError("shard.00000.mds is damaged")
            case "a mistake in the code":
                raise KeyError("x")
            case "an error that cannot be sent":
                raise type("Unknown", (ValueError,), {})("y")
            case "exit":
                os._exit(7)


class Endless:
    """Steps without end, large enough to fill a pipe; their mark is the process that makes them."""

    def __iter__(self) -> Iterator[Step]:
        """Make steps."""
        while True:
            yield replace(marked(os.getpid()), state={"ballast": bytes(1 << 20)})
