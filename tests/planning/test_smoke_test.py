"""Every recipe runs from end to end when it is cut down by one override."""

import time
from pathlib import Path

import pytest

from modernenc.config import CONF_DIR, RECIPES_DIR
from modernenc.curriculum import Curriculum
from modernenc.planning.smoke_test import scale_down
from modernenc.run_folder.checkpoints import read, tokens_seen
from modernenc.run_folder.lineage import read as read_lineage
from modernenc.run_folder.tables import Table
from modernenc.saved_config import load
from modernenc.train import main
from support.runs import composed, rollback

RECIPES = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml") if path.stem not in ("demo", "demo_mega", "own", "adapt"))
"""All that are not for a laptop anyway."""
SIZES = sorted(path.stem for path in (CONF_DIR / "ettin").glob("*.yaml"))


def rehearsed(recipe: str, corpus: Path, run_dir: Path, *overrides: str) -> Path:
    main(composed([f"+recipe={recipe}", f"smoke_test={corpus}", f"run_dir={run_dir}", *overrides]))
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_crosses_every_boundary_in_small(recipe, corpus_root, tmp_path):
    started = time.monotonic()
    folder = rehearsed(recipe, corpus_root, tmp_path / "run")
    run = load(folder)
    curriculum = Curriculum.of(run)
    for phase in run.phases:
        assert read(folder / "checkpoints" / f"end-of-{phase}.ckpt").state.tokens_seen == curriculum.end_of(phase)
    rows = Table(folder / "metrics.csv").read()
    assert [int(row["step"]) for row in rows] == list(range(1, curriculum.total_steps + 1))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    print(f"{recipe}: {curriculum.total_steps} steps in {time.monotonic() - started:.0f} s")


@pytest.mark.slow
def test_large_leaves_its_plateau_as_its_authors_did(corpus_root, tmp_path, caplog):
    """With a learning rate that surely brings nothing, in small too."""
    folder = rehearsed("large", corpus_root, tmp_path / "run", "phases.high.lr=3", "checkpoint.keep_last=99")
    assert "plateau: the median loss of the last" in caplog.text
    curriculum = Curriculum.of(load(folder))
    between = sorted((folder / "checkpoints").glob("step-*.ckpt"), key=tokens_seen)
    checkpoint = [path for path in between if tokens_seen(path) < curriculum.end_of("high")][-1]
    rollback(checkpoint, ["phases.high.lr=5e-5", "phases.high.weight_decay=1e-6"], 0)
    at = tokens_seen(checkpoint)
    rows = [row for row in Table(folder / "metrics.csv").read() if row["phase"] == "high"]
    before = [float(row["lr"]) for row in rows if int(row["tokens_seen"]) <= at]
    after = [(float(row["lr"]), float(row["weight_decay"])) for row in rows if int(row["tokens_seen"]) > at]
    assert max(before) == 3 and after and set(after) == {(5e-5, 1e-6)}
    (event,) = [entry for entry in read_lineage(folder) if entry["event"] == "rollback"]
    assert event["changed"] == ["phases.high.lr=5e-5", "phases.high.weight_decay=1e-6"]
    assert read(folder / "checkpoints" / "end-of-decay.ckpt").state.tokens_seen == curriculum.total_tokens
    assert (folder / "abandoned" / "1" / "checkpoints" / "end-of-decay.ckpt").exists()


@pytest.mark.parametrize("recipe", [*RECIPES, *(f"ettin ettin={size}" for size in SIZES)])
def test_what_shrinks_keeps_the_form_of_the_curriculum(recipe, corpus_root):
    run = composed([*f"+recipe={recipe}".split(), f"smoke_test={corpus_root}"])
    real, small = Curriculum.of(run), Curriculum.of(scale_down(run))
    assert list(real.phases) == list(small.phases)
    for name, phase in real.phases.items():
        assert len(small.stages_of(name)) == len(real.stages_of(name))
        assert small.phases[name].lr == phase.lr and small.phases[name].mask_ratio == phase.mask_ratio
        assert small.at(small.start_of(name)).backbone == real.at(real.start_of(name)).backbone
        assert sum(small.phases[name].mix.values()) == pytest.approx(sum(phase.mix.values()))
    lengths = [[phase.seq_len for phase in curriculum.phases.values()] for curriculum in (real, small)]
    assert [a < b for a, b in zip(lengths[0], lengths[0][1:], strict=False)] == [
        a < b for a, b in zip(lengths[1], lengths[1][1:], strict=False)
    ]
    assert small.total_steps < 400


def test_a_rehearsal_begins_with_the_rehearsal_of_what_the_recipe_begins_with(corpus_root, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    run = composed(["+recipe=large", f"smoke_test={corpus_root}"])
    assert not scale_down(run).init.source and "starts from random weights" in caplog.text
    base = Path("runs/smoke_tests/base/latest/checkpoints/end-of-stable.ckpt")
    base.parent.mkdir(parents=True)
    base.touch()
    assert scale_down(run).init.source == str(base)
    assert scale_down(run).run_dir.startswith("runs/smoke_tests/large/")


def test_without_its_corpus_a_rehearsal_says_how_to_prepare_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_prep \+corpus=demo"):
        scale_down(composed(["+recipe=base", f"smoke_test={tmp_path / 'nothing'}"]))
