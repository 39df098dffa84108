"""A causal ModernBERT computes what transformers' decoder of the same shape does, and may start from one."""

from typing import Any

import pytest
import torch

from modernenc.backbones.modernbert import ModernBERT
from modernenc.hugging_face.read_folder import read_folder
from modernenc.objectives.masked_lm import MaskedLM
from support.tensors import relative

THETA = 10_000.0
"""The rotary base of all layers: transformers 4 takes the global one in local layers too."""


@pytest.fixture(scope="module")
def decoder() -> Any:
    """A small decoder with weights that make every part matter."""
    from transformers.models.modernbert_decoder import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

    settings: dict[str, Any] = dict(
        vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=7, num_attention_heads=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, max_position_embeddings=300, local_attention=32,
        global_rope_theta=THETA, local_rope_theta=THETA, initializer_range=0.2,
        rope_parameters={f"{kind}_attention": {"rope_type": "default", "rope_theta": THETA} for kind in ("full", "sliding")},
    )  # fmt: skip
    torch.manual_seed(0)
    return ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**settings)).eval()


def test_a_run_that_starts_from_a_decoder_computes_what_it_does_where_it_is_causal(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    _, arguments, weights = read_folder(tmp_path, ModernBERT)
    assert (arguments["local_attention"], arguments["global_attn_every_n_layers"]) == (32, 3)
    ours = MaskedLM(ModernBERT(**arguments))
    assert not ours.load_state_dict(weights, strict=False).unexpected_keys
    decoder.config.sliding_window = 32 // 2 + 1  # its window counts the token itself
    theirs = type(decoder)(decoder.config).double().eval()
    theirs.load_state_dict(decoder.state_dict())
    ids = torch.randint(3, 80, (200,))
    with torch.no_grad():
        hidden = ours.double().backbone(ids, torch.tensor([0, 200], dtype=torch.int32), 200, causal=True)
        assert relative(ours.decoder(ours.head(hidden)), theirs(ids[None]).logits[0]) <= 1e-6  # its rotations are in fp32
