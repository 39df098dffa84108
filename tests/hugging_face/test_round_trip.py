"""A model of any shape goes to a Hugging Face folder and comes back, and goes again, with the same bytes."""

import random
from typing import Any

import pytest
import torch

from modernenc.backbones.eurobert import EuroBERT
from modernenc.backbones.mega import Mega
from modernenc.backbones.modernbert import ModernBERT
from modernenc.hugging_face import converter_of, model_of
from modernenc.hugging_face.parity import TOLERANCE, logit_difference
from modernenc.model.load import load_folder
from modernenc.objectives.masked_lm import MaskedLM

SEEDS = range(6)


def random_backbone(kind: type, rng: random.Random) -> Any:
    """Return a small backbone of a class, its sizes and options drawn at random."""
    heads = rng.choice([1, 2, 4])
    sizes: dict[str, Any] = {"vocab_size": 192, "num_hidden_layers": rng.randint(1, 5), "max_position": 192}
    if kind is ModernBERT:
        return ModernBERT(
            **sizes, hidden_size=16 * heads, intermediate_size=rng.choice([24, 48]), num_attention_heads=heads,
            global_attn_every_n_layers=rng.choice([1, 2, 3]), local_attention=rng.choice([8, 64]), global_rope_theta=160_000,
            local_rope_theta=rng.choice([500, 10_000]), norm_eps=rng.choice([1e-5, 1e-6]),
        )  # fmt: skip
    if kind is EuroBERT:
        return EuroBERT(
            **sizes, hidden_size=16 * heads, intermediate_size=48, num_attention_heads=heads,
            num_key_value_heads=rng.choice([1, heads]), rope_theta=40_000, tie_word_embeddings=rng.choice([True, False]),
        )  # fmt: skip
    return Mega(
        **sizes, hidden_size=32, intermediate_size=48, nffn_hidden_size=48, shared_representation_size=16,
        ema_projection_size=4, chunk_size=rng.choice([16, 48]), attention_activation=rng.choice(["softmax", "laplace"]),
        normalization_type=rng.choice(["scalenorm", "layernorm", "rmsnorm"]),
        relative_positional_bias=rng.choice(["simple", "rotary"]), normalize_attention=rng.choice([True, False]),
        two_hop_residual=rng.choice([True, False]),
    )  # fmt: skip


@pytest.mark.parametrize("kind", [ModernBERT, EuroBERT, Mega])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_model_comes_back_from_a_folder_as_it_was(kind, seed, tmp_path):
    if kind is EuroBERT:
        pytest.importorskip("transformers", "5", reason="transformers 4 has no EuroBERT")
    torch.manual_seed(seed)
    ours = MaskedLM(random_backbone(kind, random.Random(seed))).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    first, second = tmp_path / "first", tmp_path / "second"
    model_of(ours).save_pretrained(first)
    back = load_folder(first)
    weights = back.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in ours.state_dict().items())
    assert logit_difference(back, converter_of(ours.backbone).load(first), 192) <= TOLERANCE
    model_of(back).save_pretrained(second)
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
