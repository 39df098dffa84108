"""Spikes and plateaus are told apart from noise, and `stop` goes back no further than it must."""

import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest

from modernenc.curriculum import WATCHED_ROWS
from modernenc.exit_codes import UNSTABLE
from modernenc.model import optim
from modernenc.run_folder.checkpoints import check, last_until, newest, read, tokens_seen
from modernenc.run_folder.tables import Table
from modernenc.training.watch import Observation, Series, z_score
from support.runs import rollback, train


def test_the_z_score_of_normal_noise_is_its_deviation():
    rng = np.random.default_rng(0)
    others = rng.normal(5, 0.1, 4000).tolist()
    assert z_score(5.3, others) == pytest.approx(3, abs=0.2)
    assert z_score(5.3, [*others, *([1000.0] * 500)]) == pytest.approx(3, abs=0.6)


@pytest.fixture
def series(small_run) -> Series:
    """A series of rows of 1,000 tokens, of a model that distinguishes 512 tokens."""
    return Series(small_run("watch.window_tokens=20000"), blind_loss=math.log(512))


def test_the_first_row_of_a_run_is_judged_by_a_model_that_knows_nothing(series):
    assert series.update("stable", Observation(1000, math.log(512) + 0.5, 3.0)) == ""
    assert "spike: loss 20.000" in series.update("stable", Observation(2000, 20.0, 3.0))


def test_the_first_rows_of_a_phase_are_judged_by_the_phase_before(series):
    """Lengths and sources may change a loss somewhat; a rotary base that is wrong takes it from 6.4 to 95."""
    rng = np.random.default_rng(0)
    for row in range(1, 30):
        assert "spike" not in series.update("stable", Observation(1000 * row, 6.4 + 0.02 * rng.normal(), 0.0))
    assert series.update("extend", Observation(30_000, 7.0, 0.5)) == ""
    assert "after medians of 6." in series.update("extend", Observation(31_000, 95.0, 0.5))
    assert "spike" in series.update("extend", Observation(32_000, 6.5, 5.0))
    assert len(series.spikes) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_spike_and_spoils_no_median(series, value):
    for row in range(1, WATCHED_ROWS + 3):
        assert series.update("stable", Observation(1000 * row, 5.0 + 0.01 * (row % 3), 0.0)) == ""
        assert "spike" in series.update("stable", Observation(1000 * row, value, 0.0))
    assert "deviations above" in series.update("stable", Observation(20_000, 6.0, 0.0))


def test_a_watch_that_could_not_see_a_spike_is_noted_by_the_plan(small_run):
    from modernenc.curriculum import Curriculum
    from modernenc.planning.notes import notes

    for window, noted in (("100", True), ("1e6", False)):
        run = small_run(f"watch.window_tokens={window}")
        assert (
            any("watch.window_tokens=100 holds fewer than 8 rows" in note for note in notes(run, Curriculum.of(run), None))
            == noted
        )


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


@pytest.mark.parametrize(("own", "advised"), [([], "optim.lr=0.0005"), (["phases.stable.lr=2e-3"], "phases.stable.lr=0.001")])
def test_the_advice_lowers_the_rate_that_the_phase_has_and_names_a_checkpoint_from_before(
    small_run, caplog, monkeypatch, own, advised
):
    """Although the run saved, and pruned, while it was in trouble."""
    blow_up_after(monkeypatch, 40)
    watch = ["watch.action=stop", "watch.patience=6", "checkpoint.every_tokens=1", "checkpoint.keep_last=1"]
    run = small_run(*WATCHED, "optim=adamw", "optim.lr=1e-3", *own, *watch)
    with caplog.at_level(logging.WARNING, "modernenc"), pytest.raises(SystemExit):
        train(run)
    (said,) = (record.message for record in caplog.records if "go back to" in record.message)
    assert said.endswith(f" {advised}")
    last = Path(said.partition("go back to ")[2].partition(" under")[0])
    check(last)
    assert 38 <= read(last).state.step <= 41
    assert len(list(last.parent.glob("step-*.ckpt"))) == 2  # it, and the newest


def test_after_a_second_rollback_the_advice_is_to_go_back_to_the_second(small_run):
    folder = train(small_run())
    for _ in range(2):
        rollback(folder / "checkpoints" / "end-of-stable.ckpt", [], 500)
    position = int(tokens_seen(folder / "checkpoints" / "end-of-stable.ckpt"))
    assert last_until(folder, position) == folder / "checkpoints" / "rollback-2.ckpt"
    assert last_until(folder, 0) is None


def test_a_model_that_is_worse_than_none_is_said_to_be(small_run, caplog, monkeypatch):
    blow_up_after(monkeypatch, 40)
    with caplog.at_level(logging.WARNING, "modernenc"):
        train(small_run(*WATCHED, "optim=adamw", "watch.action=off"))
    assert re.search(r"validation loss [\d.]+: a model that knows nothing has 6\.238; this one is of no use", caplog.text)


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
