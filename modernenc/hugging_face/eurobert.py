"""EuroBERT here <-> `EuroBertForMaskedLM` of transformers 5; version 4 has no EuroBERT of its own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from modernenc.backbones.eurobert import EuroBERT
from modernenc.backbones.initial import INIT_STD
from modernenc.hugging_face import Converter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
_SAME = (*_SIZES, "tie_word_embeddings")
"""Arguments that both call alike."""


class EuroBERTConverter(Converter):
    """Reads the config.json of transformers 5, and of the published models, which had code of their own under version 4."""

    model_types: ClassVar[tuple[str, ...]] = ("eurobert",)
    prefixes: ClassVar[dict[str, str]] = {"backbone.": "model.", "decoder.": "lm_head."}
    choice_prefixes: ClassVar[dict[str, str]] = {}  # transformers has no multiple choice for it
    fixed: ClassVar[dict[str, Any]] = {"attention_bias": False, "hidden_act": "silu", "mlp_bias": False}
    irrelevant: ClassVar[tuple[str, ...]] = ("attention_dropout", "auto_map", "clf_pooling", "pretraining_tp")

    def backbone_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read the sizes, and the rotary base in either spelling; ValueError for another kind of rotation."""
        rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 250_000.0)}
        if {"rope_type": "default", **rope, "rope_theta": 0} != {"rope_type": "default", "rope_theta": 0}:
            raise ValueError(f"rope_parameters={rope} in config.json: expected rope_type default and a rope_theta")
        if config.get("rope_scaling") is not None:
            raise ValueError(f"rope_scaling={config['rope_scaling']} in config.json: expected none")
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        if config.get("head_dim") not in (None, head_dim):
            raise ValueError(f"head_dim={config['head_dim']} in config.json: expected {head_dim}, hidden_size over heads")
        return {
            **{name: config[name] for name in _SIZES},
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
            "max_position": config["max_position_embeddings"],
            "rope_theta": rope["rope_theta"],
            "norm_eps": config.get("rms_norm_eps", 1e-5),
            "init_std": config.get("initializer_range", INIT_STD),
        }

    def new_model(self, backbone: EuroBERT, **special_ids: Any) -> "PreTrainedModel":
        """Build the model as the backbone stands now, with the rotary base of the phase that it reached.

        Raises ValueError under transformers 4.
        """
        import transformers

        if not hasattr(transformers, "EuroBertConfig"):
            raise ValueError(f"transformers {transformers.__version__} has no EuroBERT; pip install 'transformers>=5'")
        config = transformers.EuroBertConfig(
            **{"pad_token_id": 0, **special_ids},
            **{name: getattr(backbone, name) for name in _SAME if name != "num_hidden_layers"},
            num_hidden_layers=len(backbone.layers),
            max_position_embeddings=backbone.max_position,
            rope_parameters={"rope_type": "default", "rope_theta": float(backbone.rope_theta)},
            rms_norm_eps=backbone.norm_eps,
            initializer_range=backbone.init_std,
            classifier_pooling="mean",
        )
        return transformers.EuroBertForMaskedLM(config)
