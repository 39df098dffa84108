"""Checkpoints of a run are evaluated by a process beside it, once each, and their scores are in its report."""

from pathlib import Path

import pytest

from modernenc.evaluation.watch import due, watch
from modernenc.reporting.page import write
from modernenc.run_folder.tables import Table
from support.corpora import WORDS, write_jsonl
from support.runs import train

MLM = "--data {} tokens_per_source=500 mask_ratios=0.15 pseudo_targets=0 shortest_context=64 --random"
"""With a second model, whose scores are not those of the checkpoint."""


@pytest.mark.slow
def test_checkpoints_are_evaluated_once_and_reported(small_run, tmp_path):
    write_jsonl(tmp_path / "text.jsonl", [" ".join(WORDS * 9)] * 5)
    suites = f'+evaluate.suites.mlm="{MLM.format(tmp_path / "text.jsonl")}"'
    run = small_run(suites, "evaluate.every_tokens=1e9")
    run_dir = train(run)
    watch(run_dir, once=True)
    rows = Table(run_dir / "evaluations.csv").read()
    assert [row["checkpoint"] for row in rows] == ["end-of-stable", "end-of-extend", "end-of-decay"]
    assert [(row["suite"], row["task"]) for row in rows] == [("mlm", "loss")] * 3
    assert all(0 < float(row["error"]) < 1 and 3 < float(row["score"]) < 8 for row in rows)
    watch(run_dir, once=False)  # ends at once: the last checkpoint is evaluated
    assert Table(run_dir / "evaluations.csv").read() == rows
    assert "scores of checkpoints over the tokens seen" in write(run).read_text()
    assert all(Path(run_dir / "evaluations" / name).exists() for name in ("mlm.html", "mlm.json"))
    assert not Path(run_dir / "evaluations" / "models").exists()  # no copy of a checkpoint stays


def test_checkpoints_between_boundaries_are_due_every_so_many_tokens(small_run):
    run_dir = train(small_run("checkpoint.every_tokens=512", "checkpoint.keep_last=99"))
    spaced = small_run("evaluate.every_tokens=3000", "+evaluate.suites.mlm=x")
    names = [path.stem for path, _ in due(spaced, run_dir)]
    assert (
        {"end-of-stable", "end-of-extend", "end-of-decay"}
        < set(names)
        < {path.stem for path in run_dir.glob("checkpoints/*.ckpt")}
    )
    row = {"step": 1, "tokens_seen": 10**9, "checkpoint": "a", "suite": "mlm", "task": "loss", "score": 1.0, "error": 0.1}
    Table(run_dir / "evaluations.csv").append(row)
    assert [path.stem for path, _ in due(spaced, run_dir)] == ["end-of-stable", "end-of-extend", "end-of-decay"]


def test_a_run_that_names_no_suites_is_one_clear_line(small_run):
    run_dir = train(small_run("phases.stable.tokens=3000"))
    with pytest.raises(ValueError, match=r"evaluate\.suites is empty; name suites"):
        watch(run_dir, once=True)


def test_a_suite_that_fails_keeps_no_other_from_its_scores(small_run, tmp_path):
    run_dir = train(small_run(f'+evaluate.suites.mlm="--data {tmp_path / "absent"}"', "phases.stable.tokens=3000"))
    with pytest.raises(ValueError, match=r"failed, with messages above: .*mlm of end-of-decay"):
        watch(run_dir, once=False)  # ends, though the last checkpoint has no score
    assert not Table(run_dir / "evaluations.csv").read()
