"""Sizes, names and first weights are those of the published models; `test_random_configurations` compares logits."""

from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from modernenc.config import CONF_DIR
from modernenc.hugging_face import converter_of
from modernenc.objectives.masked_lm import MaskedLM


def build(name: str, **changes) -> MaskedLM:
    settings = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "backbone" / f"{name}.yaml"))
    assert isinstance(settings, dict)
    return MaskedLM(get_class(settings.pop("_target_"))(**{**settings, **changes}))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("modernbert_base", 149_655_232), ("modernbert_large", 395_881_664), ("mega_small_16k", 122_568_801)],
)
def test_parameter_counts_are_the_published_ones(name, parameters):
    with torch.device("meta"):
        objective = build(name)
    assert sum(parameter.numel() for parameter in objective.parameters()) == parameters


@pytest.mark.parametrize("name", ["modernbert_tiny", "mega_small_16k"])
def test_names_of_weights_go_there_and_back(name):
    ours = build(name, num_hidden_layers=1, vocab_size=300)
    there = converter_of(ours.backbone).to_hugging_face(ours.state_dict())
    assert set(there) == set(converter_of(ours.backbone).new_model(ours.backbone).state_dict())
    assert list(converter_of(ours.backbone).from_hugging_face(there)) == list(ours.state_dict())


def test_initialisation_has_the_published_spread():
    torch.manual_seed(0)
    backbone: Any = build("modernbert_base", num_hidden_layers=2, vocab_size=2000).backbone
    inner, outer = 0.02, 0.02 / (2 * 2) ** 0.5
    cut = 0.88  # of a normal that is cut at two standard deviations
    for name, parameter in backbone.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            expected = (outer if name.endswith("Wo.weight") else inner) * cut
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.02), name
            assert float(parameter.detach().abs().max()) <= 2 * expected / cut + 1e-6, name
