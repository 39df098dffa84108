"""A sweep that is killed, or shared by processes, does each cell once and ends with the same table."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.encoders import LEARN, write_encoder, write_tasks

KILLS = int(os.environ.get("MODERNENC_KILLS", "3"))


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    encoder, tasks = write_encoder(tmp_path_factory.mktemp("encoder")), write_tasks(tmp_path_factory.mktemp("tasks"), 100)
    return [
        sys.executable, "-m", "modernenc.evaluate", "classify", f"small={encoder}", "--random", "--data", str(tasks), "--tasks",
        "fox,tags", "--seeds", "2", *LEARN, "epochs=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def table(command, tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("whole")
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=300)
    return _table(out)


def _table(out: Path) -> list[dict]:
    return [{**row, "seconds": None} for row in json.loads((out / "classify.json").read_text())["rows"]]


def _times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}


@pytest.mark.slow
def test_a_sweep_killed_at_random_does_no_cell_twice(command, table, tmp_path):
    rng = random.Random(0)
    written: dict[str, int] = {}
    for _ in range(KILLS):
        process = subprocess.Popen([*command, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        before = len(written)
        while process.poll() is None and len(_times(tmp_path)) == before and time.monotonic() - started < 120:
            time.sleep(0.02)  # until a cell is done: a kill before that would show nothing
        time.sleep(rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = _times(tmp_path)
        assert written.items() <= now.items()  # whole cells are left as they are
        written = now
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True, timeout=300)
    assert written.items() <= _times(tmp_path).items() and len(_times(tmp_path)) == 8
    assert _table(tmp_path) == table


@pytest.mark.slow
def test_commands_and_their_jobs_share_a_sweep(command, table, tmp_path):
    more = [[], ["--jobs", "2"]]  # three processes
    runs = [
        subprocess.Popen(
            [*command, "--out", str(tmp_path), *jobs], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for jobs in more
    ]
    printed = [run.communicate(timeout=300)[0] for run in runs]
    assert all(run.returncode == 0 for run in runs)
    assert [text.count("classify: scores") for text in printed] == [1, 1]  # a job of another prints no table
    done = [line.rpartition(": ")[0] for text in printed for line in text.splitlines() if line.endswith(" left")]
    assert len(done) == len(set(done)) == 8
    assert [row["model"] for row in _table(tmp_path)] == [row["model"] for row in table]


@pytest.mark.slow
def test_jobs_end_with_the_command_that_started_them(command, tmp_path):
    arguments = [*command, "--out", str(tmp_path), "--jobs", "2"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as started:
        assert started.stdout and " left" in started.stdout.readline()
        started.kill()
        rest = started.stdout.read()  # which ends when the job, too, has let go of it
    assert rest.count(" left\n") <= 2  # the cell that the job was at, and one that was done meanwhile
