"""Read transformers' config.json as arguments of a backbone, and refuse it unless all of it is understood.

An unknown key may change the model. So every key must be read by the converter, have the one value that the backbone computes
with, or be known to change no logit.
"""

from typing import Any

from modernenc.backbones import Backbone
from modernenc.hugging_face import converter_of

FIXED = {
    "add_cross_attention": False, "is_causal": False, "is_decoder": False, "is_encoder_decoder": False, "pruned_heads": {},
    "tie_encoder_decoder": False, "tie_word_embeddings": True,
}  # fmt: skip
"""Keys that have the same value in every encoder here."""
IRRELEVANT = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "chunk_size_feed_forward",
    "classifier_dropout", "classifier_pooling", "dtype", "finetuning_task", "gradient_checkpointing", "id2label", "label2id",
    "model_type", "output_attentions", "output_hidden_states", "prefix", "problem_type", "return_dict",
    "task_specific_params", "tf_legacy_loss", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version",
    "use_bfloat16", "use_cache",
    # Settings of generation, which transformers 4 writes with a whole configuration.
    "begin_suppress_tokens", "cross_attention_hidden_size", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values",
    "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip
"""Keys of any model that change no masked-LM logit, besides the ids of special tokens."""


class _Recording(dict[str, Any]):
    """A dictionary that records which of its keys were read."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def arguments_from(kind: type[Backbone], config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a backbone class for the content of a config.json.

    Raises ValueError naming a key that the backbone cannot follow, KeyError naming a missing one. A null counts as unset.
    """
    converter, recording = converter_of(kind), _Recording(config)
    arguments = converter.backbone_arguments(recording)
    fixed = {**FIXED, **converter.fixed}
    for key, value in config.items():
        if key in fixed and value != fixed[key]:
            raise ValueError(f"{key}={value} in config.json: {kind.__name__} has {fixed[key]} here, so logits would be others")
        known = key in recording.read or key in fixed or key in converter.irrelevant or key in IRRELEVANT
        if not known and value is not None and not key.endswith("_token_id"):
            raise ValueError(
                f"{key}={value} in config.json: {kind.__name__} has no such setting, so logits may be others; where it is "
                "known to change none, delete it there"
            )
    return arguments
