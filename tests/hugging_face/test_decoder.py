"""A causal ModernBERT computes what transformers' decoder of the same shape does."""

from typing import Any

import torch

from modernenc.backbones.modernbert import ModernBERT
from modernenc.objectives.masked_lm import MaskedLM
from support.tensors import relative

THETA = 10_000.0
"""The rotary base of all layers: transformers 4 takes the global one in local layers too."""


def test_a_causal_modernbert_is_the_decoder_of_transformers():
    from transformers.models.modernbert_decoder import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

    torch.manual_seed(0)
    ours = MaskedLM(ModernBERT(80, 64, 96, 7, 4, 300, THETA, THETA, local_attention=32, init_std=0.2)).double()
    backbone = ours.backbone
    settings: dict[str, Any] = dict(
        vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=7, num_attention_heads=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, max_position_embeddings=300,
        global_rope_theta=THETA, local_rope_theta=THETA,
        rope_parameters={f"{kind}_attention": {"rope_type": "default", "rope_theta": THETA} for kind in ("full", "sliding")},
        layer_types=[
            "full_attention" if kind == "global" else "sliding_attention" for kind in backbone.describe().layer_types
        ],
    )  # fmt: skip
    config = ModernBertDecoderConfig(**settings)
    config.sliding_window = 32 // 2 + 1  # its window counts the token itself
    theirs = ModernBertDecoderForCausalLM(config).double().eval()
    weights = {}
    for name, value in ours.state_dict().items():
        name = name.replace("backbone.", "model.").replace("head.", "lm_head.")
        if name.endswith("Wqkv.weight"):
            parts = zip("qkv", value.chunk(3), strict=True)
            weights |= {name.replace("Wqkv", f"{letter}_proj"): part for letter, part in parts}
        else:
            weights[name] = value
    theirs.load_state_dict(weights)
    ids = torch.randint(3, 80, (200,))
    with torch.no_grad():
        hidden = backbone(ids, torch.tensor([0, 200], dtype=torch.int32), 200, causal=True)
        assert relative(ours.decoder(ours.head(hidden)), theirs(ids[None]).logits[0]) <= 1e-6  # its rotations are in fp32
