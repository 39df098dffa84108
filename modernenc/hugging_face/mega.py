"""MEGA here <-> transformers 4's `MegaForMaskedLM`, or the code that is exported for what transformers lacks."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from modernenc.backbones.mega import Mega
from modernenc.hugging_face import MASKED_LM, Converter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MegaConverter(Converter):
    """Reads and writes transformers 4's MEGA, and this project's extension of it.

    transformers 5 dropped MEGA. An export has the names of version 4, which loads it natively where it computes the same, and
    carries `modeling_mega` for version 5 and for the settings that version 4 would misread.
    """

    model_types: ClassVar[tuple[str, ...]] = ("mega", "modernenc-mega")
    prefixes: ClassVar[dict[str, str]] = {"backbone.": "mega.", "head.dense.": "dense.", "decoder.": "mlm_head."}
    choice_prefixes: ClassVar[dict[str, str]] = {
        "backbone.": "mega.", "head.dense.": "mega.pooler.dense.", "score.": "classifier.",
    }  # fmt: skip
    fixed: ClassVar[dict[str, Any]] = {
        "activation": "silu", "add_lm_hidden_dense_layer": True, "add_token_type_embeddings": False, "bidirectional": True,
        "norm_affine": True, "normalize_before_ffn": True, "normalize_before_mega": True, "truncation": None,
        "use_normalized_ffn": True,
    }  # fmt: skip
    irrelevant: ClassVar[tuple[str, ...]] = (
        "auto_map", "ema", "ema_beta_range", "ema_delta_alpha_range", "ema_gamma_omega_range", "initializer_range",
        "num_attention_heads", "type_vocab_size", "use_feature_dropout",
    )  # fmt: skip

    def backbone_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Read the settings of either model type; without chunks, a chunk is as long as a document may be."""
        own = inspect.signature(Mega.__init__).parameters
        for key, value in (("normalization_type", "rmsnorm"), ("normalize_attention", True), ("two_hop_residual", True)):
            if config["model_type"] == "mega" and config.get(key) == value:
                raise ValueError(f"{key}={value} in config.json: in transformers' MEGA it does nothing, here it does")
        extensions = ("normalize_attention", "two_hop_residual")  # unknown to transformers' MEGA
        names = [name for name in own if name not in ("self", "max_position")]
        arguments = {name: config.get(name, own[name].default) if name in extensions else config[name] for name in names}
        if not config["use_chunking"]:
            arguments["chunk_size"] = config["max_positions"]
        return {**arguments, "max_position": config["max_positions"]}

    def new_model(self, backbone: Mega, **special_ids: Any) -> "PreTrainedModel":
        """Build a model of `modeling_mega`."""
        from modernenc.hugging_face.modeling_mega import MegaEncoderConfig, MegaForMaskedLM

        settings = {key: value for key, value in backbone.settings.items() if key != "max_position"}
        return MegaForMaskedLM(MegaEncoderConfig(**settings, max_positions=backbone.max_position, **special_ids))

    def load(self, folder: Path, kind: str = MASKED_LM) -> "PreTrainedModel":
        """Load an exported model with the code in its folder, not with the classes of this process."""
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        from modernenc.hugging_face.modeling_mega import register

        model = get_class_from_dynamic_module(f"modeling_mega.MegaFor{kind}", str(folder)).from_pretrained(folder)
        register()  # the code in the folder has registered its own classes
        return model
