"""Every recipe composes, can be planned, and the plan is the curriculum."""

import resource

import pytest

from modernenc.config import RECIPES_DIR
from modernenc.planning.checks import check_settings
from modernenc.planning.tables import plan_text
from support.commands import command
from support.runs import composed

RECIPES = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_and_its_plan_shows_every_phase(recipe):
    shape = ["backbone=modernbert_base"] if recipe == "adapt" else []  # else it is that of a model that must be there
    run = composed([f"+recipe={recipe}", *shape])
    curriculum = check_settings(run)
    shown = plan_text(run, curriculum)
    assert f"{curriculum.total_tokens:,} tokens, {curriculum.total_steps:,} optimizer steps" in shown
    for phase, setting in run.phases.items():
        assert phase in shown
        assert f"{curriculum.end_of(phase):,}" in shown
        assert all(source in shown for source in setting.mix)


def test_a_recipe_of_ones_own_starts_from_a_shipped_one(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [demo, _self_]\nphases: {decay: {tokens: 123_000}}\n"
    )
    result = command("modernenc.plan", "--config-dir", str(tmp_path), "+recipe=mine", "data.root=nowhere")
    assert result.returncode == 0, result.stderr
    assert "recipe mine: 5,516,800 parameters" in result.stdout
    assert "124,928" in result.stdout  # 61 steps of 2,048 tokens


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "stable_adamw"])
def test_every_optimizer_can_be_planned(optimizer):
    run = composed(["+recipe=demo", f"optim={optimizer}"])
    assert f"recipe demo: {5_516_800:,} parameters" in plan_text(run, check_settings(run))


def print_the_plan_of_base() -> None:
    """Plan a model of published size."""
    result = command("modernenc.plan", "+recipe=base")
    assert result.returncode == 0, result.stderr
    assert "149,655,232 parameters" in result.stdout
    assert "10,597" in result.stdout


def test_the_plan_of_base_is_printed():
    print_the_plan_of_base()


@pytest.mark.wall_clock
def test_the_plan_of_base_is_printed_in_seconds():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    print_the_plan_of_base()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime
    assert seconds < 8, seconds  # about half of that on an idle machine; on a processor, since other tests run beside
