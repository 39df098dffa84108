"""The table of phases and its pure function."""

import math

import pytest
from conftest import composed

from modernenc.config import Phase, Ramp
from modernenc.curriculum import Curriculum


def phase(**settings) -> Phase:
    defaults = dict(
        tokens=100_000, seq_len=100, batch_rows=10, lr=1.0, lr_curve="constant", weight_decay=0.1, mask_ratio=0.3, mix={"a": 1}
    )
    return Phase(**{**defaults, **settings})


def base() -> Curriculum:
    return Curriculum(composed(["+recipe=base"]).phases)


def test_base_has_the_published_step_counts():
    curriculum = base()
    levels = curriculum.levels_of("stable")
    assert [level.batch_rows for level in levels] == [768, 1536, 2304, 3072, 3840, 4608]
    assert all(abs(level.steps - 4238) <= 1 for level in levels[:-1])
    assert curriculum.levels_of("decay")[0].steps == 10_597
    assert curriculum.levels_of("extend")[0].steps == math.ceil((1_969e9 - levels[-1].end_tokens) / (576 * 8192))


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


def test_steps_walk_the_curriculum_without_gap_or_overlap():
    curriculum = Curriculum({
        "a": phase(ramp=Ramp(tokens=33_333, start_rows=3, step_rows=4)),
        "b": phase(seq_len=333, batch_rows=7, lr_curve="one_minus_sqrt"),
    })  # fmt: skip
    points = list(curriculum.steps())
    tokens = 0
    for number, point in enumerate(points):
        assert (point.tokens_seen, point.step) == (tokens, number)
        tokens += point.step_tokens
    assert tokens == curriculum.total_tokens
    assert len(points) == curriculum.total_steps


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
    ],
)
def test_a_phase_that_cannot_be_trained_is_named(settings, named):
    with pytest.raises(ValueError, match=named):
        Curriculum({"a": phase(**settings)})
