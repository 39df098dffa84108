"""All that knows transformers' names: converters of settings and weights, the exported code, the tokenizer, the parity check.

A backbone that transformers has, too, names its converter in its class attribute `HUGGING_FACE`; one without cannot be exported
or start from transformers' weights, and needs nothing else. Importing a converter does not import transformers, which takes
three seconds: only what builds a model does.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.utils import get_class

from modernenc.backbones import Backbone

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MASKED_LM, MULTIPLE_CHOICE = "MaskedLM", "MultipleChoice"
"""Kinds of models, as the names of transformers' classes end."""


class Converter(ABC):
    """Converts between one backbone class here and its model in transformers."""

    model_types: ClassVar[tuple[str, ...]]
    """The values of `model_type` in a config.json that it reads."""
    prefixes: ClassVar[dict[str, str]]
    """How names of weights in a `MaskedLM` begin, and how they begin in transformers' masked-LM model, where they differ."""
    choice_prefixes: ClassVar[dict[str, str]]
    """The same for a `MultipleChoice` with its backbone, and transformers' multiple-choice model."""
    fixed: ClassVar[dict[str, Any]]
    """Keys of config.json for which the backbone here has only this one value."""
    irrelevant: ClassVar[tuple[str, ...]]
    """Keys of config.json that change no logit."""

    @abstractmethod
    def backbone_arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the backbone's arguments for a config.json written by transformers 4 or 5.

        Raises ValueError for values that the backbone has no arguments for, KeyError for a missing key. `read_folder` checks
        the keys that are not read here.
        """

    @abstractmethod
    def new_model(self, backbone: Any, **special_ids: Any) -> "PreTrainedModel":
        """Build transformers' masked-LM model of the same shape; `special_ids` are keys of its configuration."""

    def load(self, folder: Path, kind: str = MASKED_LM) -> "PreTrainedModel":
        """Load an exported model of a kind from its folder, as one does who has no more than transformers."""
        import transformers

        return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder)

    def to_hugging_face(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Rename the weights of a `MaskedLM` as transformers does."""
        return _replace_prefixes(weights, self.prefixes)

    def from_hugging_face(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Rename transformers' weights as in a `MaskedLM`."""
        return _replace_prefixes(weights, {theirs: ours for ours, theirs in self.prefixes.items()})


def converter_of(backbone: Backbone | type[Backbone]) -> Converter:
    """Return the converter of a backbone or its class; ValueError if it names none."""
    name = getattr(backbone, "HUGGING_FACE", None)
    if name is None:
        kind = backbone if isinstance(backbone, type) else type(backbone)
        raise ValueError(
            f"{kind.__name__} has no counterpart in transformers: its class names no converter in HUGGING_FACE; write one as "
            "modernenc.hugging_face.modernbert does"
        )
    return get_class(name)()


def model_of(masked_lm: Any, **special_ids: Any) -> "PreTrainedModel":
    """Build transformers' model with the weights of a `MaskedLM`."""
    converter = converter_of(masked_lm.backbone)
    model = converter.new_model(masked_lm.backbone, **special_ids)
    model.load_state_dict(converter.to_hugging_face(masked_lm.state_dict()))
    return model


def choice_model_of(masked_lm: Any, choice: Any, **special_ids: Any) -> "PreTrainedModel":
    """Build transformers' multiple-choice model with the backbone of a `MaskedLM` and the head of a `MultipleChoice`."""
    from transformers import AutoModelForMultipleChoice

    converter = converter_of(masked_lm.backbone)
    if not converter.choice_prefixes:
        raise ValueError(
            f"transformers has no multiple choice for {type(masked_lm.backbone).__name__}: its tasks are not exported"
        )
    config = converter.new_model(masked_lm.backbone, **special_ids).config
    config.classifier_pooling = "cls"  # a choice is scored at its first token
    model = AutoModelForMultipleChoice.from_config(config)
    backbone = {f"backbone.{name}": value for name, value in masked_lm.backbone.state_dict().items()}
    model.load_state_dict(_replace_prefixes({**backbone, **choice.state_dict()}, converter.choice_prefixes))
    return model


def _replace_prefixes(weights: dict[str, Any], prefixes: dict[str, str]) -> dict[str, Any]:
    """Return the weights with the prefix of each name replaced, where it has one of `prefixes`."""
    olds = {name: next((old for old in prefixes if name.startswith(old)), "") for name in weights}
    return {prefixes.get(old, "") + name[len(old) :]: weights[name] for name, old in olds.items()}
