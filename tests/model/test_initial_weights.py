"""One seed is one model, whatever the version of torch."""

import pytest
import torch
import xxhash

from modernenc.backbones.initial import truncated_normal_
from modernenc.model.build import build_objectives, weights_of
from support.runs import SMALL, SMALL_MEGA, composed

GOLDEN = {"demo": "26cfa1516f393a49", "demo_mega": "6f5aa237ec34f42b"}
"""Hashes of all weights of masked LM and of multiple choice over either backbone, at seed 17."""


@pytest.mark.skipif(
    "AVX" not in torch.backends.cpu.get_cpu_capability(), reason="other processors round normal numbers otherwise"
)
@pytest.mark.parametrize("recipe", GOLDEN)
def test_one_seed_draws_the_same_weights_under_every_version_of_torch(recipe):
    small = {"demo": SMALL, "demo_mega": SMALL_MEGA}[recipe]
    task = ["+task@tasks.next=multiple_choice", "tasks.next.train=x", "tasks.next.validation=x", "seed=17"]
    digest = xxhash.xxh3_64()
    for name, weight in sorted(weights_of(build_objectives(composed([f"+recipe={recipe}", *small, *task]))).items()):
        digest.update(name.encode())
        digest.update(weight.detach().numpy().tobytes())
    assert digest.hexdigest() == GOLDEN[recipe]


def test_a_truncated_normal_is_cut_at_two_deviations_and_normal_within():
    torch.manual_seed(0)
    weight = torch.empty(500, 2_000)
    truncated_normal_(weight, 0.1)
    assert float(weight.abs().max()) <= 0.2
    for deviations, share in ((0.5, 0.40119), (1.0, 0.71525), (1.5, 0.90767)):  # erf(x / sqrt 2) / erf(sqrt 2)
        assert float((weight.abs() < deviations * 0.1).float().mean()) == pytest.approx(share, abs=2e-3)
    assert abs(float(weight.mean())) < 5e-4
