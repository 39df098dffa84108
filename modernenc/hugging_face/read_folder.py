"""Read the folder of a masked-LM model that `save_pretrained` wrote, without transformers.

An unknown key of config.json may change the model. So every key must be read by the converter, have the one value that the
backbone computes with, or be known to change no logit; else the folder is refused.
"""

import json
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import load_file
from torch import Tensor

from modernenc import ranges
from modernenc.backbones import Backbone
from modernenc.hugging_face import converter_of
from modernenc.hugging_face.composer import SUFFIX, read_composer

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


class _Recording(UserDict[str, Any]):
    """A mapping that records which of its keys were read."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.read: set[str] = set()
        super().__init__(content)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return self.data[key]


def read_folder(folder: Path, kind: type[Backbone]) -> tuple[Backbone, dict[str, Any], dict[str, Tensor]]:
    """Read a folder as a backbone of the given class on the meta device, its arguments, and the weights of a `MaskedLM`.

    A checkpoint of the ModernBERT repository counts as the folder that it would be. Raises FileNotFoundError or ValueError,
    naming the folder, for what cannot be followed exactly.
    """
    is_folder = folder.suffix != SUFFIX
    config, tensors = (read_config_file(folder), None) if is_folder else read_composer(folder)
    converter = converter_of(kind)
    if config.get("model_type") not in converter.model_types:
        raise ValueError(
            f"{folder} is of model_type {config.get('model_type')}, which {kind.__name__} cannot begin with; "
            f"expected {' or '.join(converter.model_types)}"
        )
    weights = converter.from_hugging_face(dict(_read_tensors(folder)) if tensors is None else tensors)
    arguments = read_config(config, kind, str(folder / "config.json" if is_folder else folder))
    with torch.device("meta"):
        backbone: Any = kind(**arguments)
    own = {f"backbone.{name}" for name, _ in backbone.named_parameters()}
    for name in sorted(own - weights.keys()):
        raise ValueError(f"{folder} has no {name}; expected a masked-LM model of transformers")
    buffers = {f"backbone.{name}" for name, _ in backbone.named_buffers()}
    for name in sorted(name for name in weights.keys() - own - buffers if name.startswith("backbone.")):
        raise ValueError(f"{folder} has {name}, which {kind.__name__} has not here: other logits")
    return backbone, arguments, weights


def read_config_file(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's config.json, or what that of a checkpoint of the ModernBERT repository would be.

    Raises FileNotFoundError or ValueError, naming the folder, if there is none.
    """
    if folder.suffix == SUFFIX:
        return read_composer(folder)[0]
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json; name a checkpoint (*.ckpt) or a Hugging Face folder")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; expected the settings of a Hugging Face model") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: expected the settings of a Hugging Face model, by their names")
    return settings


def read_config(config: dict[str, Any], kind: type[Backbone], file: str = "config.json") -> dict[str, Any]:
    """Return the arguments of a backbone class for the content of a config.json. A null counts as unset.

    Raises ValueError, naming the key and the file, for a missing key, a value out of range, or what the class cannot follow.
    """
    converter, recording = converter_of(kind), _Recording(config)
    try:
        arguments = converter.backbone_arguments(recording)
    except KeyError as error:
        raise ValueError(f"{file} has no {error}; expected what save_pretrained writes") from error
    hints = get_type_hints(kind.__init__, include_extras=True)
    for name, value in arguments.items():
        ranges.check(f"{file}: {name}", hints[name], value)
    fixed = {**FIXED, **converter.fixed}
    for key, value in config.items():
        if key in fixed and key not in recording.read and value != fixed[key]:
            raise ValueError(f"{key}={value} in {file}: {kind.__name__} has {fixed[key]} here, so logits would be others")
        known = key in recording.read or key in fixed or key in converter.irrelevant or key in IRRELEVANT
        if not known and value is not None and not key.endswith("_token_id"):
            raise ValueError(
                f"{key}={value} in {file}: {kind.__name__} has no such setting, so logits may be others; where it is known to "
                "change none, delete it there"
            )
    return arguments


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights in fp32, from safetensors or else from .bin files, which are read without running code."""
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no *.safetensors and no pytorch_model*.bin; copy the weights there")
    for path in paths:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        yield from ((name, value.float()) for name, value in tensors.items())
