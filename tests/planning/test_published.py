"""Recipes against the published numbers, by a walk over every optimizer step that knows nothing of the closed form."""

import math
from typing import Any, NamedTuple

import pytest

from modernenc.curriculum import Curriculum
from support.runs import composed


class Published(NamedTuple):
    """A phase as papers and configurations have it."""

    tokens: float
    lr: float
    rows: int
    length: int
    theta: float | None = None
    mask: float = 0.3
    decay: float = 1e-5
    ramp: tuple[float, int, int] = (0, 0, 0)
    """Tokens, first rows, rows added."""
    warmup: float = 0
    falls_to: float = 1
    """Shard of the learning rate that 1 - sqrt leaves."""
    local_theta: float | None = None
    linear_to: float = 1
    """Shard that a straight line leaves."""
    task: int = 0
    """Row capacity of a step of multiple choice."""
    every: int = 0
    """Of so many steps in a row the one after the first half is such a step; of one, all are."""


def _ettin(
    lr: float, decay: float, warmup: float, ramp: float, long: float, last: float, local: float = 1.6e5
) -> list[Published]:
    return [
        Published(1700e9, lr, 4608, 1024, decay=decay, ramp=(ramp, 768, 768), warmup=warmup),
        Published(long, lr, 4608, 7999, 1.6e5, decay=decay, falls_to=0.5, local_theta=local),
        Published(last, lr / 2, 4608, 7999, 1.6e5, mask=0.15, decay=decay, falls_to=0.04, local_theta=1.6e5),
    ]


PUBLISHED = {
    "base": [
        Published(1719e9, 8e-4, 4608, 1024, ramp=(50e9, 768, 768), warmup=3e9),
        Published(250e9, 3e-4, 576, 8192, 1.6e5),
        Published(50e9, 3e-4, 576, 8192, 1.6e5, falls_to=0.001),
    ],
    "large": [
        Published(900e9, 5e-4, 4928, 1024, ramp=(10e9, 448, 448), warmup=2e9),
        Published(819e9, 5e-5, 4928, 1024, decay=1e-6),
        Published(250e9, 5e-5, 616, 8192, 1.6e5, decay=1e-6),
        Published(50e9, 5e-5, 624, 8192, 1.6e5, decay=1e-6, falls_to=0.001),
    ],
    "ettin ettin=17m": _ettin(3e-3, 3e-4, 4e9, 125e9, 250e9, 50e9, local=1e4),
    "ettin ettin=32m": _ettin(3e-3, 3e-4, 4e9, 100e9, 250e9, 50e9),
    "ettin ettin=68m": _ettin(3e-3, 3e-4, 3e9, 75e9, 250e9, 50e9),
    "ettin": _ettin(8e-4, 1e-5, 3e9, 50e9, 250e9, 50e9),
    "ettin ettin=400m": _ettin(5e-4, 1e-5, 2e9, 10e9, 250e9, 50e9),
    "ettin ettin=1b": _ettin(5e-4, 5e-5, 2e9, 3e9, 83.3e9, 16.7e9),
    "mmbert": [
        Published(2300e9, 8e-4, 4608, 1024, decay=8e-5, ramp=(60e9, 768, 768), warmup=3e9),
        Published(600e9, 8e-4, 4608, 8192, 1.6e5, 0.15, 8e-5, local_theta=1.6e5),
        Published(100e9, 8e-4, 4608, 8192, 1.6e5, 0.05, 8e-5, falls_to=0.02, local_theta=1.6e5),
    ],
    "bioclinical": [Published(160.5e9, 3e-4, 576, 8192), Published(8.25e9, 3e-4, 576, 8192, mask=0.15, falls_to=0.001)],
    # The following have no publication to be compared with: these are the numbers that their headers state.
    "mega_small_16k": [
        Published(50e9, 5e-4, 1024, 1024, mask=0.4, ramp=(2e9, 256, 256), warmup=1e9),
        Published(30e9, 5e-4, 256, 4096, mask=0.4),
        Published(115e6, 1e-4, 0, 4096, mask=0.4, warmup=5e6, linear_to=0.1, task=64 * 4 * 128, every=1),
        Published(15e9, 2.5e-4, 64, 16384, task=64 * 4 * 128, every=20),
        Published(5e9, 2.5e-4, 64, 16384, mask=0.15, falls_to=0.001),
    ],
    "demo": [
        Published(1e6, 8e-4, 4, 256, mask=0.4, decay=1e-5, ramp=(150e3, 2, 1), warmup=80e3),
        Published(350e3, 8e-4, 2, 1024, 1.6e5, mask=0.4, decay=1e-5),
        Published(350e3, 8e-4, 2, 1024, 1.6e5, decay=1e-5, falls_to=0.001),
    ],
}


def walk(phases: list[Published]):
    """Every step: tokens seen, its phase, tokens of the phase so far, rows."""
    seen = 0
    for phase in phases:
        inside = 0
        tokens, first, added = phase.ramp
        sizes = list(range(first, phase.rows, added)) if tokens else []
        ends = [tokens * sum(sizes[: number + 1]) / sum(sizes) for number in range(len(sizes))]
        step = 0
        while inside < phase.tokens:
            rows = next((size for size, end in zip(sizes, ends, strict=True) if inside < end), phase.rows)
            chooses = bool(phase.every) and step % phase.every == phase.every // 2
            yield seen, phase, inside, rows, chooses
            step += 1
            seen += phase.task if chooses else rows * phase.length
            inside += phase.task if chooses else rows * phase.length


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_every_curve_is_the_published_one(recipe):
    curriculum = Curriculum.of(composed([f"+recipe={recipe.split()[0]}", *recipe.split()[1:]]))
    steps = list(walk(PUBLISHED[recipe]))
    assert len(steps) == curriculum.total_steps
    starts = [number for number in range(1, len(steps)) if steps[number][1] is not steps[number - 1][1]]
    places = {0, 1, 400, len(steps) - 1, *starts, *(start - 1 for start in starts), *range(0, len(steps), len(steps) // 40)}
    assert len(places) > 40
    for number in sorted(places):
        seen, phase, inside, rows, chooses = steps[number]
        spec = curriculum.at(seen)
        lr = phase.lr * (phase.falls_to + (1 - phase.falls_to) * (1 - math.sqrt(inside / phase.tokens)))
        if phase.linear_to < 1:
            lr = phase.lr * (1 - (1 - phase.linear_to) * max(0, inside - phase.warmup) / (phase.tokens - phase.warmup))
        lr *= min(1, inside / phase.warmup) if phase.warmup else 1
        expected: dict[str, Any] = {
            "step": number,
            "batch_rows": rows,
            "seq_len": phase.length,
            "mask_ratio": phase.mask,
            "objective": "swag" if chooses else "masked_lm",
            "weight_decay": phase.decay,
        }
        assert {key: getattr(spec, key) for key in expected} == expected, seen
        assert spec.lr == pytest.approx(lr, rel=1e-9, abs=1e-15), seen
        assert spec.backbone.get("global_rope_theta") == (phase.theta if recipe != "bioclinical" else None)
        assert spec.backbone.get("local_rope_theta") == phase.local_theta


def test_step_counts_that_were_published():
    base = Curriculum(composed(["+recipe=base"]).phases)
    assert base.stages_of("decay")[0].steps == 10_597
    assert all(abs(stage.steps - 4_238) <= 1 for stage in base.stages_of("stable")[:-1])
    large = Curriculum(composed(["+recipe=large"]).phases)
    assert all(abs(stage.steps - 396) <= 1 for stage in large.stages_of("high")[:-1])
    assert len(large.stages_of("high")) == 11


@pytest.mark.parametrize("recipe", ["base", "large", "ettin"])
def test_checkpoints_are_every_4000_steps_as_published(recipe):
    run = composed([f"+recipe={recipe}"])
    stage = next(
        stage for stage in Curriculum(run.phases).stages if stage.batch_rows == max(p.batch_rows for p in run.phases.values())
    )
    assert run.checkpoint.every_tokens == 4_000 * stage.batch_rows * stage.seq_len
