"""Spikes and plateaus are told apart from noise, and `stop` goes back no further than it must."""

import logging
from pathlib import Path

import numpy as np
import pytest

from modernenc.model import optim
from modernenc.run_folder.checkpoints import newest
from modernenc.run_folder.tables import Table
from modernenc.training.watch import UNSTABLE, z_score
from support.runs import train


def test_the_z_score_of_normal_noise_is_its_deviation():
    rng = np.random.default_rng(0)
    others = rng.normal(5, 0.1, 4000).tolist()
    assert z_score(5.3, others) == pytest.approx(3, abs=0.2)
    assert z_score(5.3, [*others, *([1000.0] * 500)]) == pytest.approx(3, abs=0.6)


WATCHED = ["watch.window_tokens=100000", "phases.stable.tokens=30000", "checkpoint.keep_last=100"]


def test_a_run_that_learns_is_left_in_peace(small_run, caplog):
    with caplog.at_level(logging.WARNING, "modernenc"):
        train(small_run(*WATCHED))
    assert "spike: loss" not in caplog.text


def test_stop_ends_a_spiking_run_without_saving_and_says_what_to_go_back_to(small_run, caplog, monkeypatch):
    """A learning rate far too high from the midst of a phase on: what a bad stretch of data does."""
    blow_up_after(monkeypatch, 40)
    run = small_run(*WATCHED, "optim=adamw", "watch.action=stop", "watch.patience=2")
    with caplog.at_level(logging.WARNING, "modernenc"), pytest.raises(SystemExit) as stopped:
        train(run)
    assert stopped.value.code == UNSTABLE
    folder = Path(run.run_dir)
    last = newest(folder)
    steps = [int(row["step"]) for row in Table(folder / "metrics.csv").read()]
    assert last is not None and steps[-1] > 40
    assert "spike: loss" in caplog.text
    assert "without saving" in caplog.text and "--rollback" in caplog.text and "--skip-tokens" in caplog.text
    assert not (folder / "checkpoints" / f"step-{steps[-1]:08d}.ckpt").exists()


def blow_up_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From a step on, the learning rate is ten thousand times what the curriculum says, which no model survives."""
    apply = optim.apply
    calls = []

    def hotter(optimizers, spec, lr_scale):
        optimizers = list(optimizers)
        apply(optimizers, spec, lr_scale)
        calls.append(spec)
        if len(calls) > step:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= 10_000

    monkeypatch.setattr(optim, "apply", hotter)
