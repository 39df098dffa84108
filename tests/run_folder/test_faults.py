"""What can break while a run goes on: one message that names it, nothing lost, nothing trained on that should not be.

Each fault meets a run that was stopped in its midst. The run must refuse to go on and change nothing; once the fault is mended,
it must end with the weights of a run that never met it.
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modernenc.exit_codes import STOP_SIGNALS, STOPPED
from modernenc.hashing import hash_file
from modernenc.run_folder import checkpoints
from modernenc.run_folder.checkpoints import newest
from modernenc.saved_config import load
from support.commands import ROOT
from support.damage import edit, flip, truncate
from support.results import FINAL, same
from support.runs import SMALL, composed, resume, small, train

HALF = 6000
"""Tokens of the run that are done."""


@pytest.fixture
def root(corpus_root: Path, tmp_path: Path) -> Path:
    """Data to break."""
    return Path(shutil.copytree(corpus_root, tmp_path / "data"))


@pytest.fixture(scope="module")
def halfway(corpus_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose second half is still to come, beside the checkpoint that it should end with."""
    folder = tmp_path_factory.mktemp("halfway") / "run"
    settings = ["+recipe=demo", *SMALL, f"data.root={corpus_root}", f"run_dir={folder}", "checkpoint.keep_last=100"]
    train(composed(settings))
    for path in (folder / FINAL, checkpoints.manifest_of(folder / FINAL)):
        path.rename(folder.with_name(f"final{path.suffix}"))
    for path in (folder / "checkpoints").glob("*.ckpt"):
        if checkpoints.tokens_seen(path) > HALF:
            checkpoints.remove(path)
    return folder


@pytest.fixture
def stopped(halfway: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of it, and that checkpoint."""
    return Path(shutil.copytree(halfway, tmp_path / "run")), halfway.with_name("final.ckpt")


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("docstrings/slice-000/bucket-*/*.mds"))


def index(root: Path) -> Path:
    return root / "docstrings" / "slice-000" / "index.json"


def swapped(root: Path) -> None:
    """Another shard of the right size, with an index that agrees: only the checkpoint knows better."""
    flip(shards(root)[0])
    digest = hash_file(shards(root)[0])
    edit(index(root), "shards", 0, "raw_data", "hashes", value={"xxh3_64": digest})


DATA = {
    "missing shard": (
        lambda root: shards(root)[0].unlink(),
        r"shard\.00000\.mds is named by .*index\.json but absent; restore it",
    ),
    "truncated shard": (lambda root: truncate(shards(root)[0]), r"shard\.00000\.mds has \d+ bytes, expected \d+; restore it"),
    "flipped byte": (
        lambda root: [flip(path) for path in shards(root)],
        r"shard\.0000\d\.mds is corrupt: xxh3_64 .*restore it",
    ),
    "wrong hash": (
        lambda root: edit(index(root), "shards", 0, "raw_data", "hashes", value={"xxh3_64": "0" * 16}),
        r"not the data that the checkpoint was trained with",
    ),
    "no index": (lambda root: index(root).unlink(), r"index\.json is missing"),
    "no manifest": (lambda root: (root / "manifest.json").unlink(), r"data\.root=.*no manifest\.json there"),
    "changed tokenizer": (
        lambda root: edit(root / "manifest.json", "tokenizer", "sha256", value="0" * 64),
        r"tokenizer\.json is not the tokenizer that made the token ids",
    ),
    "changed data": (swapped, r"not the data that the checkpoint was trained with"),
}


@pytest.mark.parametrize("fault", DATA)
def test_broken_data_are_named_and_not_trained_on(stopped, root, tmp_path, fault):
    folder, final = stopped
    breaks, message = DATA[fault]
    whole = Path(shutil.copytree(root, tmp_path / "whole"))
    held = sorted(path.name for path in (folder / "checkpoints").iterdir())
    breaks(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        resume(folder, [f"data.root={root}"])
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == held
    resume(folder, [f"data.root={whole}"])
    assert same(folder / FINAL, final)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_broken_checkpoint_is_passed_over_or_named(stopped, damage, caplog):
    folder, final = stopped
    broken = newest(folder)
    assert broken is not None
    damage(broken)
    with pytest.raises(ValueError, match=rf"{broken.name} is (not whole|corrupt).*take another"):
        resume(broken, [])
    resume(folder, [])
    assert f"skipped: {broken}" in caplog.text
    assert same(folder / FINAL, final)


def resized(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_a_full_disk_ends_the_run_with_its_last_checkpoint_whole(stopped, small_disk):
    folder, final = stopped
    disk = small_disk(64)
    moved = Path(shutil.copytree(folder, disk / "run"))
    used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*"))
    resized(disk, f"size={used + (900 << 10)}")  # room for one more checkpoint, not for two
    with pytest.raises(
        OSError, match=r"could not be written: .*No space left.*the checkpoints before it are whole.*modernenc.resume"
    ):
        resume(moved, [])
    last = newest(moved)
    assert last is not None
    assert not list(moved.rglob("*.tmp"))
    resized(disk, "size=64m")
    resume(moved, [])
    assert same(moved / FINAL, final)


def test_a_disk_that_is_full_when_a_command_writes_is_said_with_the_file_and_leaves_nothing_behind(stopped, small_disk):
    folder, _ = stopped
    disk = small_disk(64)
    moved = Path(shutil.copytree(folder, disk / "run"))
    resized(disk, f"size={sum(path.stat().st_blocks * 512 for path in disk.rglob('*')) + 4096}")
    before = sorted(disk.rglob("*"))
    for command in (["report", str(moved)], ["export", str(moved), str(disk / "out")]):
        line = [sys.executable, "-m", f"modernenc.{command[0]}", *command[1:]]
        result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 2 and re.search(r"^error: .*No space left", result.stderr, re.M), result.stderr
        assert sorted(disk.rglob("*")) == before


def test_a_corpus_that_was_moved_is_named_once(stopped, root, tmp_path):
    folder, final = stopped
    moved = root.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"if the corpus was moved, add data\.root=ITS_FOLDER; else prepare"):
        resume(folder, [f"data.root={root}"])
    checkpoints.remove(newest(folder) or folder)
    resume(folder, [f"data.root={moved}"])
    assert load(folder).data.root == str(moved)
    assert same(folder / FINAL, final)
    resume(folder, [])


@pytest.fixture
def read_only(small_disk) -> Iterator[Callable[[Path], Path]]:
    disk = small_disk(64)

    def make(folder: Path) -> Path:
        moved = Path(shutil.copytree(folder, disk / "run"))
        resized(disk, "ro")
        return moved

    yield make


def test_a_run_folder_that_cannot_be_written_is_said_before_training(stopped, read_only, small_run, tmp_path):
    folder, final = stopped
    moved = read_only(folder)
    with pytest.raises(OSError, match=r"Read-only file system: .*run"):
        resume(moved, [])
    with pytest.raises(OSError, match=r"Read-only file system: .*new"):
        train(small_run(f"run_dir={moved.parent / 'new'}"))
    resized(moved.parent, "rw")
    resume(moved, [])
    assert same(moved / FINAL, final)


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("command", ["train", "resume"])
def test_a_signal_while_a_run_starts_asks_for_another_start(corpus_root, small_run, tmp_path, command, number):
    if command == "train":
        arguments = small(corpus_root, tmp_path / "new")
    else:
        arguments = [str(train(small_run()) / "checkpoints" / "end-of-stable.ckpt")]
    process = subprocess.Popen(
        [sys.executable, "-m", f"modernenc.{command}", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    status = Path(f"/proc/{process.pid}/status")
    last = STOP_SIGNALS[-1]  # Python has a handler of its own for the first
    while not int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16) >> (last - 1) & 1:
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == STOPPED and f"{number.name} while no step was under way: nothing was lost" in said
