"""Further processes that share the cells of an evaluation: copies of the command, each on a GPU or on some of the cores."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PARENT = "MODERNENC_EVALUATION_PARENT"
"""Environment variable that tells a copy which process started it; it ends when that one has gone."""


def is_copy() -> bool:
    """Return whether this process was started by `sharing`."""
    return PARENT in os.environ


def parent_lives() -> bool:
    """Return whether the process that started this one as a copy is still there; True in one that is no copy."""
    return not is_copy() or os.getppid() == int(os.environ[PARENT])


@contextmanager
def sharing(jobs: int) -> Iterator[None]:
    """Start copies of this command so that `jobs` processes do the work, this one among them; 0 means one for each GPU.

    Each has a GPU of its own as long as there are some, and its share of the cores. They end with this process, however it
    ends, after the cell that they are at.
    """
    import torch

    gpus = [] if is_copy() else _gpus(torch.cuda.device_count())
    jobs = 1 if is_copy() else jobs or max(1, len(gpus))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environments = [
        {**os.environ, PARENT: str(os.getpid()), "OMP_NUM_THREADS": str(threads), **_on_gpu(gpus, number)}
        for number in range(jobs)
    ]
    os.environ.update(_on_gpu(gpus, 0))  # before CUDA is first used; transformers would otherwise split batches over all GPUs
    if jobs > 1:
        torch.set_num_threads(threads)
    # `sys.argv` has lost what was taken off it, such as --allow-code.
    copies = [subprocess.Popen(sys.orig_argv, env=environment, stdin=subprocess.DEVNULL) for environment in environments[1:]]
    try:
        yield
        for copy in copies:
            copy.wait()
    finally:
        for copy in copies:
            copy.terminate()


def _gpus(count: int) -> list[str]:
    """Return the names of the visible GPUs."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",") if count else []


def _on_gpu(gpus: list[str], number: int) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
