"""The table of phases and its pure function."""

import math
from itertools import pairwise

import pytest

from modernenc.config import Phase, Ramp, Task
from modernenc.curriculum import CAUSAL_LM, MASKED_LM, Curriculum, items_per_micro_batch
from support.runs import composed


def phase(**settings) -> Phase:
    defaults = dict(
        tokens=100_000, seq_len=100, batch_rows=10, lr=1.0, lr_curve="constant", weight_decay=0.1, mask_ratio=0.3, mix={"a": 1}
    )
    return Phase(**{**defaults, **settings})


def base() -> Curriculum:
    return Curriculum(composed(["+recipe=base"]).phases)


def test_base_has_the_published_step_counts():
    curriculum = base()
    stages = curriculum.stages_of("stable")
    assert [stage.batch_rows for stage in stages] == [768, 1536, 2304, 3072, 3840, 4608]
    assert all(abs(stage.steps - 4238) <= 1 for stage in stages[:-1])
    assert curriculum.stages_of("decay")[0].steps == 10_597
    assert curriculum.stages_of("extend")[0].steps == math.ceil((1_969e9 - stages[-1].end_tokens) / (576 * 8192))


def test_base_curves_equal_independent_arithmetic():
    curriculum = base()
    for tokens in (0, 1e9, 2.5e9, 2.999e9, 3e9, 4e10, 1e12, 1.7e12):
        assert curriculum.at(int(tokens)).lr == pytest.approx(8e-4 * min(1, tokens / 3e9))
    start = curriculum.start_of("decay")
    for share in (0, 0.01, 0.1, 0.25, 0.5, 0.81, 0.99):
        expected = 3e-4 * (0.001 + 0.999 * (1 - math.sqrt(share)))
        assert curriculum.at(start + int(share * 50e9)).lr == pytest.approx(expected, rel=1e-6)
    for tokens, rows in ((0, 768), (3.4e9, 1536), (1.1e10, 2304), (2.1e10, 3072), (3.4e10, 3840), (5.1e10, 4608), (1e12, 4608)):
        assert curriculum.at(int(tokens)).batch_rows == rows
    assert curriculum.at(10**12).backbone.get("global_rope_theta") is None
    assert curriculum.at(1_800 * 10**9).backbone["global_rope_theta"] == 160_000


def test_what_a_phase_sets_of_the_backbone_stays_set_in_the_next():
    curriculum = base()
    assert curriculum.at(curriculum.start_of("decay")).backbone["global_rope_theta"] == 160_000


def test_every_curve_equals_independent_arithmetic():
    def factors(**settings) -> list[float]:
        curriculum = Curriculum({"a": phase(lr=0.5, **settings)})
        return [curriculum.at(tokens).lr / 0.5 for tokens in range(0, 100_000, 4_000)]

    shares = [tokens / 100_000 for tokens in range(0, 100_000, 4_000)]
    assert factors(lr_curve="linear", final_lr_factor=0.2) == pytest.approx([1 - 0.8 * x for x in shares])
    expected = [0.1 + 0.9 * math.cos(math.pi * x / 2) ** 2 for x in shares]
    assert factors(lr_curve="cosine", final_lr_factor=0.1) == pytest.approx(expected)
    late = [max(0.0, (x - 0.2) / 0.8) for x in shares]
    warm = [
        0.25 + 0.75 * x / 0.2 if x < 0.2 else 0.1 + 0.9 * math.cos(math.pi * y / 2) ** 2
        for x, y in zip(shares, late, strict=True)
    ]
    rising = factors(lr_curve="cosine", final_lr_factor=0.1, warmup_tokens=20_000, first_lr_factor=0.25)
    assert rising == pytest.approx(warm)


@pytest.mark.parametrize("share, steps", [(0, 0), (0.25, 25), (0.251, 26), (1, 100)])
def test_the_first_share_of_a_phase_is_causal(share, steps):
    curriculum = Curriculum({"a": phase(), "b": phase(causal_share=share)})
    specs = list(curriculum.steps())
    assert [spec.objective for spec in specs] == [MASKED_LM] * 100 + [CAUSAL_LM] * steps + [MASKED_LM] * (100 - steps)
    assert [spec.first_row for spec in specs[100:]] == list(range(0, 1_000, 10))
    plain = Curriculum({"a": phase(), "b": phase()})
    assert [(spec.lr, spec.step_tokens) for spec in specs] == [(spec.lr, spec.step_tokens) for spec in plain.steps()]


def test_an_infinite_schedule_is_phases_that_cool_stay_and_warm_up_again():
    """Ibrahim et al. 2024, arXiv:2403.08763: from any checkpoint of `stay`, anneal, or warm up again on other data."""
    curriculum = Curriculum({
        "cool": phase(lr_curve="cosine", final_lr_factor=0.5, warmup_tokens=10_000),
        "stay": phase(lr=0.5),
        "again": phase(warmup_tokens=10_000, first_lr_factor=0.5, lr_curve="cosine", final_lr_factor=0.5),
        "anneal": phase(lr=0.5, lr_curve="linear"),
    })  # fmt: skip
    learning_rates = [spec.lr for spec in curriculum.steps()]
    assert learning_rates[0] == 0 and max(learning_rates) == 1
    jumps = [abs(after - before) for before, after in pairwise(learning_rates)]
    assert max(jumps) <= 0.1 + 1e-9  # a step of the first warmup: nothing jumps at the boundaries


def test_a_ramp_has_levels_of_equal_steps_or_of_equal_tokens():
    by_steps = Curriculum({"a": phase(tokens=1_000_000, batch_rows=40, ramp=Ramp(600_000, 10, 10, "steps"))})
    by_tokens = Curriculum({"a": phase(tokens=1_000_000, batch_rows=40, ramp=Ramp(600_000, 10, 10, "tokens"))})
    assert [stage.steps for stage in by_steps.stages] == [100, 100, 100, 100]
    assert [stage.steps for stage in by_tokens.stages] == [200, 100, 67, 100]
    for curriculum in (by_steps, by_tokens):
        assert [stage.batch_rows for stage in curriculum.stages] == [10, 20, 30, 40]


def test_a_level_of_the_ramp_whose_tokens_have_passed_already_has_no_step():
    curriculum = Curriculum({"a": phase(batch_rows=40, ramp=Ramp(300, 10, 10, "tokens"))})
    assert [(stage.batch_rows, stage.steps) for stage in curriculum.stages] == [(10, 1), (40, 25)]


def test_a_forward_pass_takes_as_many_items_as_its_tokens_hold_and_one_at_least():
    task = Task("", "", seq_len=32, batch_items=8)
    assert [items_per_micro_batch(task, tokens) for tokens in (1, 128, 383, 384)] == [1, 1, 2, 3]


@pytest.mark.parametrize(("key", "least"), [("seq_len", 16), ("batch_items", 1), ("validation_items", 1)])
def test_a_task_that_is_too_small_is_named(key, least):
    def curriculum(value: int) -> Curriculum:
        settings = {"seq_len": 32, "batch_items": 8, "validation_items": 20, key: value}
        return Curriculum({"a": phase(objectives={"masked_lm": 1, "next": 1})}, {"next": Task("", "", **settings)})

    assert curriculum(least).total_steps
    with pytest.raises(ValueError, match=rf"tasks.next.{key}={least - 1}: expected {least} or more"):
        curriculum(least - 1)


def test_steps_walk_the_curriculum_without_gap_or_overlap():
    curriculum = Curriculum({
        "a": phase(ramp=Ramp(tokens=33_333, start_rows=3, step_rows=4)),
        "b": phase(seq_len=333, batch_rows=7, lr_curve="one_minus_sqrt"),
    })  # fmt: skip
    specs = list(curriculum.steps())
    tokens = 0
    for number, spec in enumerate(specs):
        assert (spec.tokens_seen, spec.step) == (tokens, number)
        tokens += spec.step_tokens
    assert tokens == curriculum.total_tokens
    assert len(specs) == curriculum.total_steps


def test_a_phase_ends_at_the_first_step_boundary_at_or_past_its_budget():
    curriculum = Curriculum({"a": phase(tokens=100_001), "b": phase()})
    assert curriculum.end_of("a") == 101_000
    assert curriculum.at(100_999).phase == "a"
    assert curriculum.at(101_000).phase == "b"


def test_the_position_within_a_step_belongs_to_that_step():
    curriculum = Curriculum({"a": phase()})
    assert curriculum.at(999).step == 0
    assert curriculum.at(1000).step == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tokens": 0}, "phases.a.tokens"),
        ({"tokens": 10.5}, "phases.a.tokens"),
        ({"lr": 0}, "phases.a.lr"),
        ({"lr_curve": "sine"}, "phases.a.lr_curve=sine: expected one of constant"),
        ({"mask_ratio": 1.0}, "phases.a.mask_ratio"),
        ({"mix": {}}, "phases.a.mix"),
        ({"mix": {"x": -1, "y": 1}}, "phases.a.mix.x"),
        ({"mix": {"x": 0}}, "phases.a.mix"),
        ({"warmup_tokens": 200_000}, "phases.a.warmup_tokens"),
        ({"ramp": Ramp(tokens=200_000, start_rows=1, step_rows=1)}, "phases.a.ramp.tokens"),
        ({"ramp": Ramp(tokens=1_000, start_rows=10, step_rows=1)}, "phases.a.ramp.start_rows"),
        ({"ramp": Ramp(tokens=1_000, start_rows=1, step_rows=0)}, "phases.a.ramp.step_rows"),
        ({"ramp": Ramp(tokens=1_000, start_rows=1, step_rows=1, equal="rows")}, "phases.a.ramp.equal=rows: expected one of"),
        ({"first_lr_factor": 1.5}, "phases.a.first_lr_factor"),
    ],
)
def test_a_phase_that_cannot_be_trained_is_named(settings, named):
    with pytest.raises(ValueError, match=named):
        Curriculum({"a": phase(**settings)})
