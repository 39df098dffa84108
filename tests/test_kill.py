"""kill -9 of the whole process group, then resume: the weights end as they would have."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, command

from modernenc.checkpoints import read
from modernenc.checks import check_run
from modernenc.data.loader import DataState, Steps
from modernenc.metrics import Table

LONGER = [
    "phases.stable.tokens=60000", "phases.extend.tokens=40000", "phases.decay.tokens=40000", "data.workers=1",
    "checkpoint.every_tokens=4000", "backbone.attention_out_dropout=0.1",
]  # fmt: skip
FINAL = Path("checkpoints") / "end-of-decay.ckpt"


def launch(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_at(process: subprocess.Popen[bytes], run_dir: Path, step: int) -> None:
    """Kill the process and its workers once the run has recorded `step`; it must still be running then."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        rows = Table(run_dir / "metrics.csv").read()
        if rows and int(rows[-1]["step"] or 0) >= step:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.01)
    raise TimeoutError(f"step {step} was not reached")


@pytest.mark.slow
def test_killed_three_times_ends_with_the_same_weights(small_run, corpus_root, tmp_path):
    run = small_run(*LONGER)
    curriculum, corpus = check_run(run)
    windows = [[lane["window"] for lane in step.state["lanes"].values()]
               for step in Steps(run, curriculum, corpus, 0, 1, DataState())]  # fmt: skip
    refills = [number for number in range(20, len(windows)) if windows[number] != windows[number - 1]]
    extend = curriculum.levels_of("extend")[0]
    moments = sorted([
        next(number for number in refills if number > 60) + 1,
        extend.first_step + extend.steps // 2,
        int(np.random.default_rng(0).integers(extend.first_step + extend.steps, curriculum.total_steps - 15)),
    ])  # fmt: skip
    settings = ["+recipe=demo", *SMALL, *LONGER, f"data.root={corpus_root}"]
    whole = command("modernenc.train", *settings, f"run_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    process = launch("modernenc.train", *settings, f"run_dir={killed}")
    for moment in moments:
        kill_at(process, killed, moment)
        process = launch("modernenc.resume", str(killed))
    assert process.wait(timeout=120) == 0
    one = read(tmp_path / "whole" / FINAL)
    other = read(killed / FINAL)
    assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
    assert one["state"]["data"] == other["state"]["data"]
    rows = [Table(folder / "metrics.csv").read() for folder in (tmp_path / "whole", killed)]
    assert [(row["step"], row["loss"]) for row in rows[0]] == [(row["step"], row["loss"]) for row in rows[1]]
