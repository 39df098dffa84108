"""ModernBERT here <-> `ModernBertForMaskedLM` of transformers 4 and 5; and from `ModernBertDecoderForCausalLM`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from modernenc.backbones.initial import INIT_STD
from modernenc.backbones.modernbert import ModernBERT
from modernenc.hugging_face import Converter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DECODER = "modernbert-decoder"


class ModernBERTConverter(Converter):
    """Reads and writes both spellings of a ModernBERT's config.json.

    transformers 4 has `global_attn_every_n_layers` and one theta per layer type; 5 has the type of every layer and the rotary
    settings of each type. In a file that has both, they must agree.

    A decoder, as Ettin has them (Weller et al. 2025, arXiv:2507.11412), has the same layers: a run that starts from one, and is
    causal, computes what it does.
    """

    model_types: ClassVar[tuple[str, ...]] = ("modernbert", DECODER)
    prefixes: ClassVar[dict[str, str]] = {"backbone.": "model."}
    choice_prefixes: ClassVar[dict[str, str]] = {"backbone.": "model.", "score.": "classifier."}
    fixed: ClassVar[dict[str, Any]] = {
        "attention_bias": False, "causal_mask": False, "decoder_bias": True, "hidden_activation": "gelu", "mlp_bias": False,
        "norm_bias": False, "classifier_activation": "gelu", "classifier_bias": False,  # of the masked-LM head too
    }  # fmt: skip
    irrelevant: ClassVar[tuple[str, ...]] = (
        "attention_dropout", "deterministic_flash_attn", "embedding_dropout", "initializer_cutoff_factor", "mlp_dropout",
        "reference_compile", "repad_logits_with_grad", "sparse_pred_ignore_index", "sparse_prediction",
        "layer_norm_eps", "position_embedding_type",  # in the published config.json, but read by neither version
    )  # fmt: skip

    def backbone_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read either spelling."""
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        thetas, side = _read_thetas(config), config.get("sliding_window")  # which transformers 4 writes of a decoder
        local_attention = config.get("local_attention", 128 if side is None else 2 * side)
        if side not in (None, local_attention // 2):
            raise ValueError(f"sliding_window={side} in config.json: expected half of local_attention={local_attention}")
        return {
            **{name: config[name] for name in names},
            "max_position": config["max_position_embeddings"],
            "global_rope_theta": thetas["full_attention"],
            "local_rope_theta": thetas["sliding_attention"],
            "global_attn_every_n_layers": _read_period(config),
            "local_attention": local_attention,
            "norm_eps": config.get("norm_eps", 1e-5),
            "init_std": config.get("initializer_range", INIT_STD),
        }

    def from_hugging_face(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Rename weights; a decoder's projections to queries, keys and values become one matrix."""
        joined = {}
        for name, value in weights.items():
            stem, _, part = name.rpartition("attn.")
            if part == "q_proj.weight":
                joined[f"{stem}attn.Wqkv.weight"] = torch.cat([weights[f"{stem}attn.{one}_proj.weight"] for one in "qkv"])
            elif part not in ("k_proj.weight", "v_proj.weight"):
                joined[name.removeprefix("lm_")] = value  # lm_head is a decoder's name for the head
        return super().from_hugging_face(joined)

    def new_model(self, backbone: ModernBERT, **special_ids: Any) -> "PreTrainedModel":
        """Build the model as the backbone stands now, with the thetas of the phase that it reached."""
        from transformers import ModernBertConfig, ModernBertForMaskedLM

        thetas = {"full_attention": float(backbone.global_rope_theta), "sliding_attention": float(backbone.local_rope_theta)}
        layer_types = [
            "full_attention" if kind == "global" else "sliding_attention" for kind in backbone.describe().layer_types
        ]
        both = {  # version 4 reads the first three, 5 the others; either writes what it does not read, if set as an attribute
            "global_attn_every_n_layers": backbone.global_attn_every_n_layers,
            "global_rope_theta": thetas["full_attention"],
            "local_rope_theta": thetas["sliding_attention"],
            "layer_types": layer_types,
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
        }
        config = ModernBertConfig(
            **{"pad_token_id": 0, **special_ids},
            vocab_size=backbone.vocab_size,
            hidden_size=backbone.hidden_size,
            intermediate_size=backbone.intermediate_size,
            num_hidden_layers=len(backbone.layers),
            num_attention_heads=backbone.num_attention_heads,
            max_position_embeddings=backbone.max_position,
            norm_eps=backbone.norm_eps,
            local_attention=backbone.local_attention,
            initializer_range=backbone.init_std,
            classifier_pooling="mean",
            **both,
        )
        for name, value in both.items():
            setattr(config, name, value)
        return ModernBertForMaskedLM(config)


def _read_thetas(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the rotary base of each layer type, under transformers 5's names; ValueError for any other kind of rotation."""
    version_5 = config.get("rope_parameters") or {}
    for kind, rope in version_5.items():
        known = kind in ("full_attention", "sliding_attention") and isinstance(rope, dict)
        if not known or {**rope, "rope_theta": 0} not in ({"rope_theta": 0}, {"rope_type": "default", "rope_theta": 0}):
            raise ValueError(
                f"rope_parameters.{kind}={rope} in config.json: expected rope_type default and a rope_theta, of full_attention "
                "and sliding_attention"
            )
    local = 160_000.0 if config.get("model_type") == DECODER else 10_000.0
    thetas, defaults = {}, {"global_rope_theta": 160_000.0, "local_rope_theta": local}
    for kind, key in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta")):
        five = version_5.get(kind, {}).get("rope_theta")
        four = config.get(key, defaults[key])
        # In version 4 a local theta of null means the global one.
        four = config.get("global_rope_theta", defaults["global_rope_theta"]) if four is None else four
        if five is not None and key in config and five != four:
            raise ValueError(f"{key}={four} in config.json, but rope_parameters.{kind} has {five}; delete the wrong one")
        thetas[kind] = four if five is None else five
    return thetas


def _read_period(config: Mapping[str, Any]) -> int:
    """Return n where attention is global at every n-th layer, from the first; ValueError when it is global at others."""
    every, kinds = config.get("global_attn_every_n_layers"), config.get("layer_types")
    if kinds is None:
        return 3 if every is None else every
    if every is None:
        every = kinds[1:].index("full_attention") + 1 if "full_attention" in kinds[1:] else len(kinds)
    layers = range(config["num_hidden_layers"])
    if kinds != ["sliding_attention" if index % every else "full_attention" for index in layers]:
        raise ValueError(
            f"layer_types={kinds} in config.json: expected full_attention at every n-th of {len(layers)} layers, with the n of "
            "global_attn_every_n_layers where that is there too"
        )
    return every
