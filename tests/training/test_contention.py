"""A run that shares its cores with other programs says so, once."""

import logging
import subprocess
import sys
import time

import pytest

from modernenc.training import contention
from support.commands import ROOT, importing
from support.runs import train

SHARED = """
import os, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # two threads on one core
import torch
from modernenc.training.contention import waited_s
torch.set_num_threads(2)
matrix = torch.ones(1024, 1024)
before, started = waited_s(), time.monotonic()
while time.monotonic() - started < 2:
    matrix @ matrix
print((waited_s() - before) / (time.monotonic() - started))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how long a thread waits for a core")
def test_threads_that_share_a_core_wait_for_it():
    result = subprocess.run(
        [sys.executable, "-c", SHARED], cwd=ROOT, env=importing(), capture_output=True, text=True, check=True
    )
    assert float(result.stdout) > 0.5


@pytest.mark.parametrize(("share", "warnings"), [(0.05, 0), (0.4, 1)])
def test_a_run_that_waits_for_cores_says_so_once(small_run, monkeypatch, caplog, share, warnings):
    monkeypatch.setattr(contention, "_INTERVAL_S", 0)
    monkeypatch.setattr(contention, "waited_s", lambda: share * 2 * time.monotonic())
    monkeypatch.setattr(contention.torch, "get_num_threads", lambda: 2)
    with caplog.at_level(logging.WARNING):
        train(small_run())
    said = [record.message for record in caplog.records if "OMP_WAIT_POLICY=PASSIVE" in record.message]
    assert len(said) == warnings
    assert all("each of 2 threads waited 40 %" in line for line in said)
