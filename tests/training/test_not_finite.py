"""A gradient that is not finite never becomes a step, and weights that are not finite never become a checkpoint or a model."""

import logging
import math
import shutil
from pathlib import Path

import pytest
import torch

from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.exit_codes import UNSTABLE
from modernenc.model.export import export
from modernenc.objectives import Objectives
from modernenc.planning.model_checks import check_init
from modernenc.reporting.comparison import compare
from modernenc.run_folder import checkpoints
from modernenc.run_folder.averaging import average
from modernenc.run_folder.checkpoints import newest, read
from modernenc.run_folder.tables import Table
from modernenc.training import skipping
from support.results import FINAL, metrics, same_state
from support.runs import composed, resume, small, train


def spoil(monkeypatch: pytest.MonkeyPatch, rows: range, factor: float = math.nan) -> None:
    """Multiply the loss of micro-batches that begin with one of these rows of their phase, in the second phase and later."""
    forward = Objectives.forward

    def spoiled(self, batch):
        loss, correct = forward(self, batch)
        longest = int(batch.cu_seqlens.diff().max())
        return (loss * factor if self.training and longest > 64 and batch.first_row in rows else loss), correct

    monkeypatch.setattr(Objectives, "forward", spoiled)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(small_run, monkeypatch, caplog):
    spoil(monkeypatch, range(6, 9))
    with caplog.at_level(logging.WARNING, "modernenc"):
        folder = train(small_run("phases.extend.tokens=6000"))
    rows = Table(folder / "metrics.csv").read()
    skipped = [row for row in rows if int(row["skipped"])]
    assert skipped and {row["phase"] for row in skipped} <= {"extend", "decay"}
    assert all(math.isnan(float(row["loss"])) for row in skipped)  # every step is recorded, and this one predicted nothing
    assert all(math.isfinite(float(row["loss"])) for row in rows if row not in skipped)
    assert sum(int(row["skipped"]) for row in rows) == caplog.text.count("skipped, because its gradient is not finite")
    assert (folder / FINAL).exists() and (folder / "report.html").exists()


def test_a_skipped_step_leaves_weights_and_optimizers_as_they_were(small_run, monkeypatch):
    spoil(monkeypatch, range(6, 9))
    folder = train(small_run("phases.extend.tokens=6000", "checkpoint.every_tokens=1", "checkpoint.keep_last=1000"))
    (first, *_) = (int(row["step"]) for row in Table(folder / "metrics.csv").read() if int(row["skipped"]))
    before, after = (read(folder / "checkpoints" / f"{checkpoints.name_at_step(step)}.ckpt") for step in (first - 1, first))
    assert after.state.tokens_seen > before.state.tokens_seen and after.state.skipped_steps == 1
    for name, weight in before.weights.items():
        assert torch.equal(weight, after.weights[name])
    for one, other in zip(before.optimizers, after.optimizers, strict=True):
        for name, state in one["state"].items():
            assert all(
                torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][name][key])) for key, value in state.items()
            )


def test_a_run_that_skipped_steps_resumes_to_the_same_bits(small_run, monkeypatch, tmp_path):
    spoil(monkeypatch, range(6, 12))
    folder = train(
        small_run("phases.extend.tokens=6000", "checkpoint.every_tokens=1", "checkpoint.keep_last=1000", "logger.every_steps=4")
    )
    amid = next(
        path
        for path in sorted((folder / "checkpoints").glob("step-*.ckpt"))
        if (state := read(path).state).skipped_steps and state.unlogged
    )
    resumed = Path(shutil.copytree(folder, tmp_path / "resumed"))
    for path in (resumed / "checkpoints").glob("*.ckpt"):
        if checkpoints.sort_key(path) > checkpoints.sort_key(amid):
            checkpoints.remove(path)
    resume(resumed, [])
    assert same_state(folder / FINAL, resumed / FINAL)
    assert metrics(folder) == metrics(resumed)


def test_a_norm_is_too_large_only_when_it_is_far_above_enough_others():
    earlier = [1.0, 1.2] * (skipping.REMEMBERED // 4)  # mean 1.1, standard deviation 0.1
    assert skipping.reason_to_skip(1.69, earlier, 6) == "" != skipping.reason_to_skip(1.71, earlier, 6)
    assert skipping.reason_to_skip(1000, earlier, 0) == skipping.reason_to_skip(1000, earlier[:-1], 6) == ""
    assert skipping.reason_to_skip(math.inf, [], 0) == "its gradient is not finite"
    grown = list(earlier)
    for _ in range(skipping.REMEMBERED):
        grown = skipping.remember(50, grown)
    assert skipping.reason_to_skip(50, grown, 6) == "" and len(grown) == skipping.REMEMBERED
    assert skipping.remember(math.nan, grown) == grown


def test_a_run_skips_steps_whose_gradient_is_far_too_large_and_resumes_to_the_same_bits(
    small_run, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(skipping, "REMEMBERED", 8)
    spoil(monkeypatch, range(20, 24), 1000)
    folder = train(
        small_run("phases.extend.tokens=9000", "checkpoint.every_tokens=1", "checkpoint.keep_last=1000", "skip_norm_sigmas=6")
    )
    assert (
        sum(int(row["skipped"]) for row in Table(folder / "metrics.csv").read())
        == caplog.text.count("its gradient norm is")
        > 0
    )
    amid = next(path for path in sorted((folder / "checkpoints").glob("step-*.ckpt")) if read(path).state.skipped_steps)
    resumed = Path(shutil.copytree(folder, tmp_path / "resumed"))
    for path in (resumed / "checkpoints").glob("*.ckpt"):
        if checkpoints.sort_key(path) >= checkpoints.sort_key(amid):
            checkpoints.remove(path)
    resume(resumed, [])
    assert same_state(folder / FINAL, resumed / FINAL)
    assert metrics(folder) == metrics(resumed)


def test_too_many_skipped_steps_end_the_run_and_name_the_checkpoint_to_go_back_to(small_run, monkeypatch, caplog):
    spoil(monkeypatch, range(4, 10_000))
    run = small_run("phases.extend.tokens=60000", "watch.max_skipped_steps=5", "watch.action=off", "checkpoint.keep_last=2")
    with caplog.at_level(logging.WARNING, "modernenc"), pytest.raises(SystemExit) as stopped:
        train(run)
    assert stopped.value.code == UNSTABLE
    assert "5 steps in a row were skipped (watch.max_skipped_steps)" in caplog.text
    folder = Path(run.run_dir)
    said = caplog.text[caplog.text.rindex("python -m modernenc.resume") :].split()
    assert Path(said[3]).suffix == ".ckpt" and read(Path(said[3])).state.skipped_steps == 0
    assert not (folder / FINAL).exists()
    last = newest(folder)
    assert last is not None and all(weight.isfinite().all() for weight in read(last).weights.values())


@pytest.fixture
def spoiled_run(small_run, monkeypatch) -> Path:
    """The folder of a run whose last checkpoint holds a weight that is no number, as another program may have left it."""
    folder = train(small_run())
    content = read(folder / FINAL)
    content.weights["backbone.final_norm.weight"][3] = math.nan
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "check_finite", lambda weights, where: None)
        checkpoints.write(content, folder / FINAL)
    return folder


def test_weights_that_are_not_finite_are_refused_by_every_reader(spoiled_run, corpus_root, tmp_path):
    final, message = spoiled_run / FINAL, r"end-of-decay.ckpt: backbone.final_norm.weight is not finite"
    stable = spoiled_run / "checkpoints" / "end-of-stable.ckpt"
    started = composed(small(corpus_root, tmp_path / "other", f"init.source={final}"))
    for act in (
        lambda: export([final], tmp_path / "out", None),
        lambda: average([stable, final], "uniform"),
        lambda: compare([stable, final], []),
        lambda: check_init(started, Corpus.of(started.data)),
        lambda: resume(spoiled_run, []),
    ):
        with pytest.raises(ValueError, match=message):
            act()
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_not_written_and_no_checkpoint_goes_for_them(small_run, tmp_path):
    folder = train(small_run())
    content, before = read(folder / FINAL), sorted(path.name for path in (folder / "checkpoints").iterdir())
    content.weights["backbone.final_norm.weight"][3] = math.inf
    writer = checkpoints.CheckpointWriter(folder, keep_last=1)
    writer.save(content, checkpoints.name_at_step(10_000), checkpoints.UNSHARDED)
    with pytest.raises(ValueError, match=r"step-00010000.ckpt: backbone.final_norm.weight is not finite"):
        writer.close()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before


def test_a_rotary_base_of_a_later_phase_that_makes_no_number_is_refused_before_training(small_run):
    with pytest.raises(ValueError, match=r"phases\.extend\.backbone\.global_rope_theta=0"):
        train(small_run("phases.extend.backbone.global_rope_theta=0"))


def test_a_phase_that_was_saved_and_not_validated_is_validated_by_the_resume(small_run, tmp_path):
    folder = train(small_run())
    whole = Table(folder / "validation.csv").read()
    ends = [int(row["step"]) for row in whole]
    for missing in sorted(set(ends)):
        copy = Path(shutil.copytree(folder, tmp_path / str(missing)))
        for path in (copy / "checkpoints").glob("*.ckpt"):
            if read(path).state.step > missing:
                checkpoints.remove(path)
        Table(copy / "validation.csv").cut_after(missing - 1)
        (copy / "report.html").unlink()
        resume(copy, [])
        assert Table(copy / "validation.csv").read() == whole
        assert (copy / "report.html").exists()
    assert Curriculum.of(small_run()).total_steps == max(ends)
