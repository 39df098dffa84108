"""Every recipe runs from end to end when it is cut down by one override."""

import time
from pathlib import Path

import pytest
from conftest import composed

from modernenc.checkpoints import read
from modernenc.config import CONF_DIR, RECIPES_DIR
from modernenc.curriculum import Curriculum
from modernenc.metrics import Table
from modernenc.rehearsal import cut_down
from modernenc.train import main

RECIPES = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml") if not path.stem.startswith("demo"))
SIZES = sorted(path.stem for path in (CONF_DIR / "ettin").glob("*.yaml"))


def rehearsed(recipe: str, corpus: Path, run_dir: Path, *overrides: str) -> Path:
    main(cut_down(composed([f"+recipe={recipe}", f"rehearse={corpus}", f"run_dir={run_dir}", *overrides])))
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_crosses_every_boundary_in_small(recipe, corpus_root, tmp_path):
    started = time.monotonic()
    folder = rehearsed(recipe, corpus_root, tmp_path / "run")
    run = composed([f"+recipe={recipe}", f"rehearse={corpus_root}"])
    curriculum = Curriculum(cut_down(run).phases)
    for phase in run.phases:
        assert read(folder / "checkpoints" / f"end-of-{phase}.ckpt")["state"]["tokens_seen"] == curriculum.end_of(phase)
    rows = Table(folder / "metrics.csv").read()
    assert [int(row["step"]) for row in rows] == list(range(1, curriculum.total_steps + 1))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    print(f"{recipe}: {curriculum.total_steps} steps in {time.monotonic() - started:.0f} s")


@pytest.mark.parametrize("recipe", [*RECIPES, *(f"ettin ettin={size}" for size in SIZES)])
def test_what_shrinks_keeps_the_form_of_the_curriculum(recipe, corpus_root):
    run = composed([*f"+recipe={recipe}".split(), f"rehearse={corpus_root}"])
    real, small = Curriculum(run.phases), Curriculum(cut_down(run).phases)
    assert list(real.phases) == list(small.phases)
    for name, phase in real.phases.items():
        assert len(small.levels_of(name)) == len(real.levels_of(name))
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
    run = composed(["+recipe=large", f"rehearse={corpus_root}"])
    assert not cut_down(run).init.source and "begins with random weights" in caplog.text
    base = Path("runs/rehearsals/base/latest/checkpoints/end-of-stable.ckpt")
    base.parent.mkdir(parents=True)
    base.touch()
    assert cut_down(run).init.source == str(base)
    assert cut_down(run).run_dir.startswith("runs/rehearsals/large/")


def test_without_its_corpus_a_rehearsal_says_how_to_prepare_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_prep \+corpus=demo"):
        cut_down(composed(["+recipe=base", f"rehearse={tmp_path / 'nothing'}"]))
