"""The loader's worker, however processes start and whatever the machine lacks: a Mac's `spawn`, a container's little shared
memory, few open files. What a worker makes is what the trainer would make itself, and its end is told in one line."""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from modernenc.data.choices import Choices, Item
from modernenc.data.loader import Step, Steps
from modernenc.data.state import DataState
from modernenc.data.worker import StepLoader
from modernenc.planning.checks import check_run
from modernenc.run_folder.checkpoints import read
from support.commands import ROOT, importing
from support.results import FINAL, same
from support.runs import SMALL, task
from support.steps import Ends

RUN = (
    "import multiprocessing, runpy, sys; multiprocessing.set_start_method(sys.argv[1]);"
    "module, sys.argv = sys.argv[2], sys.argv[2:]; runpy.run_module(module, run_name='__main__', alter_sys=True)"
)
"""As on a system on which processes start so."""


def settings(corpus_root: Path, items: Path, folder: Path) -> list[str]:
    """A run with a task."""
    return [
        "+recipe=demo", *SMALL, *task(items), f"data.root={corpus_root}", f"run_dir={folder}", "phases.stable.tokens=1500",
        "phases.stable.ramp.tokens=0", "phases.extend.tokens=1500", "phases.decay.tokens=1500",
        "+phases.extend.objectives={masked_lm: 1, next: 1}",
    ]  # fmt: skip


def train_by(method: str, *arguments: str, shell: str = "", timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, method, "modernenc.train", *arguments]
    if shell:
        command = ["unshare", "-m", "bash", "-c", f'{shell} && exec "$@"', "bash", *command]
    environment = importing(OMP_NUM_THREADS="1")
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture(scope="module")
def whole(corpus_root: Path, items: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that starts no process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = train_by("fork", *settings(corpus_root, items, folder), "data.workers=0")
    assert result.returncode == 0, result.stderr
    return folder / FINAL


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_weights_do_not_depend_on_the_start_method_of_the_worker(corpus_root, items, tmp_path, whole, method):
    result = train_by(method, *settings(corpus_root, items, tmp_path / "run"), "data.workers=1")
    assert result.returncode == 0, result.stderr
    assert same(tmp_path / "run" / FINAL, whole)


def unshared(shell: str) -> str:
    """A command for a file system of its own."""
    if sys.platform != "linux" or os.geteuid() or subprocess.run(
        ["unshare", "-m", "bash", "-c", shell], capture_output=True, check=False
    ).returncode:  # fmt: skip
        pytest.skip("only root can take parts of the file system away")
    return shell


@pytest.mark.slow
def test_training_works_by_spawn_without_proc_and_shared_memory(corpus_root, items, tmp_path, whole):
    """As far as Linux can be one: `spawn`, no /proc, no shared memory at all."""
    shell = unshared("mount -t tmpfs tmpfs /proc && mount -t tmpfs -o ro tmpfs /dev/shm")
    result = train_by("spawn", *settings(corpus_root, items, tmp_path / "run"), "data.workers=1", shell=shell)
    assert result.returncode == 0, result.stderr
    ends = [read(path).state for path in (tmp_path / "run" / FINAL, whole)]  # torch takes other kernels without /proc
    assert ends[0].data == ends[1].data and ends[0].step == ends[1].step
    assert "bf16 matrix" not in result.stdout + result.stderr  # nothing is known of the processor, so nothing is advised


BIG = [
    "phases.stable.batch_rows=400", "phases.stable.ramp.tokens=0", "phases.stable.tokens=120000", "phases.extend.tokens=1500",
    "phases.decay.tokens=1500", "checkpoint.every_tokens=0", "data.workers=1",
]  # fmt: skip
"""Steps of 400 rows."""


@pytest.mark.slow
def test_little_shared_memory_is_enough(corpus_root, tmp_path):
    """Docker gives 64 MB; here it is 256 kB, and steps are in proportion."""
    shell = unshared("mount -t tmpfs -o size=256k tmpfs /dev/shm")
    arguments = ["+recipe=demo", *SMALL, f"data.root={corpus_root}", f"run_dir={tmp_path / 'run'}", *BIG]
    result = train_by("fork", *arguments, shell=shell, timeout_s=120)
    assert result.returncode == 0, result.stderr


OPEN_FILES = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from support.shapes import check_shapes
check_shapes()
from support.runs import composed
from modernenc.planning.checks import check_run
from modernenc.data.loader import Steps
from modernenc.data.state import DataState
from modernenc.data.worker import StepLoader
run = composed(sys.argv[1:])
loader = StepLoader(Steps(run, *check_run(run), 0, 1, DataState()), workers=1, pin_memory=False)
steps = []
for step in loader:
    steps.append(step)
    if len(steps) == 3:
        break
assert all(len(step.micro_batches) == 400 for step in steps), [len(step.micro_batches) for step in steps]
assert len(os.listdir("/dev/fd")) < 64, os.listdir("/dev/fd")
"""


def test_open_files_do_not_grow_with_micro_batches(corpus_root, tmp_path):
    arguments = ["+recipe=demo", *SMALL, f"data.root={corpus_root}", *BIG, "trainer.micro_batch_tokens=64"]
    line = [sys.executable, "-c", OPEN_FILES, *arguments]
    result = subprocess.run(line, cwd=ROOT, env=importing(), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


def equal(one: Step, other: Step) -> bool:
    tensors = ("input_ids", "cu_seqlens", "target_positions", "targets")
    plain = ("max_seqlen", "num_tokens", "first_row", "objective")
    return (
        (one.targets, one.tokens, one.state) == (other.targets, other.tokens, other.state)
        and len(one.micro_batches) == len(other.micro_batches)
        and all(
            all(getattr(mine, name) == getattr(theirs, name) for name in plain)
            and all(getattr(mine, name).dtype == getattr(theirs, name).dtype for name in tensors)
            and all(torch.equal(getattr(mine, name), getattr(theirs, name)) for name in tensors)
            for mine, theirs in zip(one.micro_batches, other.micro_batches, strict=True)
        )
    )


@pytest.fixture
def steps(small_run, items) -> Steps:
    run = small_run(*task(items), "+phases.extend.objectives={masked_lm: 1, next: 1}")
    return Steps(run, *check_run(run), 0, 1, DataState())


def test_steps_and_their_source_can_be_pickled_without_loss(steps):
    there = pickle.loads(pickle.dumps(steps))
    made = list(steps)
    assert {batch.objective for step in made for batch in step.micro_batches} == {"masked_lm", "next"}
    assert all(equal(step, pickle.loads(pickle.dumps(step))) for step in made)
    assert all(equal(step, other) for step, other in zip(made, there, strict=True))
    assert all(equal(step, other) for step, other in zip(made, StepLoader(steps, 1, pin_memory=False), strict=True))


def test_names_of_special_tokens_in_text_stay_text_in_another_process(steps):
    """A tokenizer forgets on its way that it is to take them so."""
    here = steps.tasks["next"]
    there: Choices = pickle.loads(pickle.dumps(here))
    item = Item("what [MASK] is", ("a [SEP] b", "[CLS]", "c", "d"), 0)
    assert there.encode(item) == here.encode(item)
    assert not {*here.encode(item)[0].context} & {*vars(here.roles).values()}


def taken(steps: Any) -> list[int]:
    return [step.targets for step in iter(StepLoader(steps, 1, pin_memory=False))]


ENDINGS = [
    ("killed", ChildProcessError, r"data.workers=1: the loader process was killed by SIGKILL, .*memory.*data.workers=0"),
    ("a mistake in the data", ValueError, r"^shard.00000.mds is damaged$"),
    ("a mistake in the code", ChildProcessError, r"the loader process ended with status 1, as its own output says"),
    ("an error that cannot be sent", ChildProcessError, r"the loader process ended with status 1"),
    ("exit", ChildProcessError, r"the loader process ended with status 7"),
]


@pytest.mark.wall_clock
@pytest.mark.parametrize(("how", "kind", "message"), ENDINGS)
def test_the_end_of_a_worker_is_reported_at_once(how, kind, message, capfd):
    started = time.monotonic()
    with pytest.raises(kind, match=message):
        taken(Ends(how))
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(("how", "kind", "message"), ENDINGS)
def test_the_end_of_a_worker_is_reported_and_leaves_no_thread(how, kind, message, capfd):
    threads = threading.active_count()
    with pytest.raises(kind, match=message):
        taken(Ends(how))
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


def test_a_loader_that_is_closed_with_steps_to_spare_leaves_no_thread(steps):
    """As at a stop: the thread has taken steps ahead of the trainer, and further ones wait in the pipe."""
    threads = threading.active_count()
    taking = iter(StepLoader(steps, 1, pin_memory=False))
    next(taking)
    time.sleep(0.5)
    cast(Generator[Any], taking).close()
    assert threading.active_count() <= threads


def test_the_worker_ignores_a_signal_to_stop():
    assert taken(Ends("a signal to stop")) == [0, 1]


ORPHAN = """
import sys, time
from support.steps import Endless
from modernenc.data.worker import StepLoader
sys.platform = "darwin"  # without Linux's own means to end with a parent
steps = iter(StepLoader(Endless(), 1, pin_memory=False))
print(next(steps).targets, flush=True)
time.sleep(600)
"""


def test_a_worker_does_not_outlive_a_killed_trainer():
    trainer = subprocess.Popen([sys.executable, "-c", ORPHAN], cwd=ROOT, env=importing(), stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    os.kill(worker, 0)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the worker lives")


def test_a_worker_that_gives_nothing_ends_the_run_with_a_line():
    """As one that waits for a network disk that does not answer."""

    class Silent:
        def __iter__(self):
            time.sleep(600)
            yield

    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"data.loader_timeout_s=0.5: the loader process gave no step"):
        next(iter(StepLoader(cast(Any, Silent()), 1, pin_memory=False, timeout_s=0.5)))
    assert time.monotonic() - started < 30
