"""MEGA for transformers, built from the code that trained it. An exported model carries this file and the files it imports.

- transformers 4 has a MEGA of its own, with the same model type and weight names, so it loads an export natively. Where that
  would compute something else, the model type is `OWN_TYPE`, which only loads with `trust_remote_code=True`.
- transformers 5 has none. `trust_remote_code=True`, or importing this module, brings it back.
- Under either, importing this module makes the automatic classes of transformers choose the classes here.
- Any length works, and any mask of ones and zeros. Chunks are counted from the first token that the mask keeps, so padding on
  either side changes nothing.
"""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import modeling_outputs as outputs

from modernenc.backbones.gated_attention import chunks_of
from modernenc.backbones.initial import INIT_STD
from modernenc.backbones.mega import Mega
from modernenc.kernels.device import lengths_of
from modernenc.kernels.documents import Documents
from modernenc.kernels.dropout import Dropout
from modernenc.shapes import Float, Int

OWN_TYPE = "modernenc-mega"
"""Model type of a MEGA that transformers 4 would misread as its own."""
_SETTINGS = [name for name in inspect.signature(Mega.__init__).parameters if name not in ("self", "max_position")]
"""Arguments of the backbone that have the same name in transformers' configuration."""


class MegaEncoderConfig(transformers.PretrainedConfig):
    """The backbone's settings under transformers' names, and those that transformers' MEGA does not know.

    Defaults are the sizes of mega-encoder-small-16k and those of `Mega`.
    """

    model_type = "mega"

    def __init__(self, **settings: Any) -> None:
        arguments = inspect.signature(Mega.__init__).parameters
        defaults = {
            **{name: arguments[name].default for name in _SETTINGS},
            "vocab_size": 50_265, "hidden_size": 768, "num_hidden_layers": 8, "intermediate_size": 2_304,
            "nffn_hidden_size": 2_304, "shared_representation_size": 192, "ema_projection_size": 32, "chunk_size": 1_024,
            "max_positions": 16_384, "use_chunking": True, "add_lm_hidden_dense_layer": True, "classifier_dropout": None,
            # transformers 5 has no defaults for these, and would untie the decoder silently without the last.
            "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": True,
            "auto_map": dict(AUTO_MAP),
        }  # fmt: skip
        super().__init__(**{**defaults, **settings})

    def to_dict(self) -> dict[str, Any]:
        """Choose the model type: transformers 4 ignores the options of Megalodon, and its RMSNorm does nothing."""
        misread = self.normalization_type == "rmsnorm" or self.normalize_attention or self.two_hop_residual
        return {**super().to_dict(), "model_type": OWN_TYPE if misread else self.model_type}

    @classmethod
    def get_config_dict(cls, *names: Any, **settings: Any) -> Any:
        """Read either model type as this class."""
        content, unused = super().get_config_dict(*names, **settings)
        return {**content, "model_type": cls.model_type}, unused

    def backbone(self) -> Mega:
        """Build the backbone that this describes."""
        settings = {key: getattr(self, key) for key in _SETTINGS}
        if not self.use_chunking:
            settings["chunk_size"] = self.max_positions
        return Mega(**settings, max_position=self.max_positions)

    def head_dropout(self) -> Dropout:
        """Build the dropout of a new head."""
        return Dropout(self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout)


class MegaPreTrainedModel(transformers.PreTrainedModel):
    """What all models with a MEGA backbone share."""

    config_class = MegaEncoderConfig
    base_model_prefix = "mega"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise new heads; the backbone initialises itself."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INIT_STD)
            nn.init.zeros_(module.bias)

    def save_pretrained(self, save_directory: Any, *arguments: Any, **settings: Any) -> None:
        """Write the model and its code, which transformers writes by itself only where it has loaded it from a folder."""
        super().save_pretrained(save_directory, *arguments, **settings)
        if __name__.startswith("modernenc."):
            import_module("modernenc.hugging_face.remote_code").write(Path(save_directory), __name__)


class MegaModel(MegaPreTrainedModel):
    """The MEGA encoder, which returns hidden states and, if built with a pooler, the pooled first token."""

    def __init__(self, config: MegaEncoderConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        backbone = config.backbone()
        self.embedding_layer = backbone.embedding_layer
        self.layers = backbone.layers
        self.chunk_size = backbone.chunk_size
        self.pooler = Pooler(config.hidden_size) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embedding_layer.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding."""
        self.embedding_layer.word_embeddings = value

    def forward(
        self,
        input_ids: Int[torch.Tensor, "batch length"] | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: Float[torch.Tensor, "batch length hidden"] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> Any:
        """Return hidden states, which are zero where `attention_mask` is. Attention probabilities are never returned.

        Raises ValueError unless exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds = self.embedding_layer.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        # Pack the rows: only kept tokens, documents end to end, as the backbone was trained.
        kept = torch.ones(embeds.shape[:2], device=embeds.device) if attention_mask is None else attention_mask
        kept = kept.bool()
        lengths = kept.sum(1)
        ends = F.pad(lengths[lengths > 0].cumsum(0), (1, 0)).int()
        documents = Documents(lengths_of(ends), embeds.device)
        chunks = chunks_of(documents, self.chunk_size)
        hidden = embeds[kept]
        all_hidden = [embeds]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(layer.__call__, hidden, documents, chunks)
            else:
                hidden = layer(hidden, documents, chunks)
            if output_hidden_states:
                all_hidden.append(_unpack(hidden, kept))
        last = _unpack(hidden, kept)
        pooled = self.pooler(last) if self.pooler is not None else None
        fields = {"last_hidden_state": last, "pooler_output": pooled}
        fields["hidden_states"] = tuple(all_hidden) if output_hidden_states else None
        return _result(outputs.BaseModelOutputWithPoolingAndCrossAttentions, return_dict, **fields)


class MegaWithHead(MegaPreTrainedModel):
    """The MEGA encoder with a head: subclasses add modules in `_add_head`, and turn the encoder's output into logits."""

    output_class: ClassVar[type]
    pooled: ClassVar[bool] = False

    def __init__(self, config: MegaEncoderConfig) -> None:
        super().__init__(config)
        self.mega = MegaModel(config, add_pooling_layer=self.pooled)
        self._add_head(config)
        self.post_init()

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        return_dict: Any = None,
        **others: Any,
    ) -> Any:
        """Return logits and, given `labels`, their loss: the mean cross-entropy over labels that are not -100."""
        out = self.mega(input_ids, attention_mask, inputs_embeds, **others)
        return self._with_loss(out, self._logits(out), labels, return_dict)

    def _with_loss(self, out: Any, logits: torch.Tensor, labels: torch.Tensor | None, return_dict: bool | None) -> Any:
        """Return the output of the model for the encoder's output and the logits."""
        loss = None if labels is None else self._loss(logits, labels)
        return _result(self.output_class, return_dict, loss=loss, logits=logits, hidden_states=out.hidden_states)

    def _add_head(self, config: MegaEncoderConfig) -> None:
        raise NotImplementedError

    def _logits(self, out: Any) -> torch.Tensor:
        raise NotImplementedError

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


class MegaForMaskedLM(MegaWithHead):
    """Logits of every id at every token."""

    output_class = outputs.MaskedLMOutput
    # transformers 4 would accept a list; 5 needs to know which weight is tied to which.
    _tied_weights_keys = {"mlm_head.weight": "mega.embedding_layer.word_embeddings.weight"}  # noqa: RUF012

    def _add_head(self, config: MegaEncoderConfig) -> None:
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder, whose weight is the token embedding."""
        return self.mlm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the decoder."""
        self.mlm_head = new_embeddings

    def _logits(self, out: Any) -> torch.Tensor:
        return self.mlm_head(self.dense(out.last_hidden_state).tanh())


class MegaForSequenceClassification(MegaWithHead):
    """One label or number per sequence, from its first token.

    The loss is the squared error for a single label, the cross-entropy for whole numbers, and the binary cross-entropy of each
    label for floats.
    """

    output_class = outputs.SequenceClassifierOutput

    def _add_head(self, config: MegaEncoderConfig) -> None:
        self.classifier = ClassificationHead(config)

    def _logits(self, out: Any) -> torch.Tensor:
        return self.classifier(out.last_hidden_state)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.config.num_labels == 1:
            return F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
        if labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, labels)
        return super()._loss(logits, labels)


class MegaForTokenClassification(MegaWithHead):
    """One label per token."""

    output_class = outputs.TokenClassifierOutput

    def _add_head(self, config: MegaEncoderConfig) -> None:
        self.dropout = config.head_dropout()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # pyright: ignore[reportArgumentType]

    def _logits(self, out: Any) -> torch.Tensor:
        return self.classifier(self.dropout(out.last_hidden_state))


class MegaForMultipleChoice(MegaWithHead):
    """A choice among sequences, `(batch, choices, length)`, by their pooled first tokens."""

    output_class = outputs.MultipleChoiceModelOutput
    pooled = True

    def _add_head(self, config: MegaEncoderConfig) -> None:
        self.dropout = config.head_dropout()
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        return_dict: Any = None,
        **others: Any,
    ) -> Any:
        """Return scores, `(batch, choices)`, and, given `labels`, their cross-entropy."""
        given = (input_ids, attention_mask, inputs_embeds)
        shape = next(part.shape[:2] for part in given if part is not None)
        out = self.mega(*(None if part is None else part.flatten(0, 1) for part in given), **others)
        return self._with_loss(out, self.classifier(self.dropout(out.pooler_output)).view(shape), labels, return_dict)


class MegaForQuestionAnswering(MegaPreTrainedModel):
    """The first and the last token of the answer in each sequence."""

    def __init__(self, config: MegaEncoderConfig) -> None:
        super().__init__(config)
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        return_dict: Any = None,
        **others: Any,
    ) -> Any:
        """Return logits of each token as the start and as the end, and, given the positions, their mean cross-entropy.

        Positions beyond the sequence are ignored.
        """
        out = self.mega(input_ids, attention_mask, inputs_embeds, **others)
        start, end = self.qa_outputs(out.last_hidden_state).unbind(-1)
        loss, length = None, start.shape[1]
        if start_positions is not None and end_positions is not None:
            pairs = ((start, start_positions), (end, end_positions))
            parts = [F.cross_entropy(x.float(), at.flatten().clamp(0, length), ignore_index=length) for x, at in pairs]
            loss = sum(parts) / 2
        fields = {"loss": loss, "start_logits": start, "end_logits": end, "hidden_states": out.hidden_states}
        return _result(outputs.QuestionAnsweringModelOutput, return_dict, **fields)


class Pooler(nn.Module):
    """First token, dense layer, tanh."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Float[torch.Tensor, "batch length hidden"]) -> Float[torch.Tensor, "batch hidden"]:
        return self.dense(hidden[:, 0]).tanh()


class ClassificationHead(nn.Module):
    """First token, dense layer, tanh, and a linear map to labels."""

    def __init__(self, config: MegaEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = config.head_dropout()
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)  # pyright: ignore[reportArgumentType]

    def forward(self, hidden: Float[torch.Tensor, "batch length hidden"]) -> Float[torch.Tensor, "batch labels"]:
        return self.out_proj(self.dropout(self.dense(self.dropout(hidden[:, 0])).tanh()))


def _result(kind: Any, return_dict: bool | None, **fields: Any) -> Any:
    out = kind(**fields)
    return out.to_tuple() if return_dict is False else out


def _unpack(hidden: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Put packed tokens back into their rows; padding is zero."""
    out = hidden.new_zeros(*kept.shape, hidden.shape[-1])
    out[kept] = hidden
    return out


_MODELS = {
    "AutoModel": MegaModel, "AutoModelForPreTraining": MegaForMaskedLM, "AutoModelForMaskedLM": MegaForMaskedLM,
    "AutoModelForSequenceClassification": MegaForSequenceClassification,
    "AutoModelForTokenClassification": MegaForTokenClassification, "AutoModelForMultipleChoice": MegaForMultipleChoice,
    "AutoModelForQuestionAnswering": MegaForQuestionAnswering,
}  # fmt: skip
AUTO_MAP = {
    auto: f"{__name__.rpartition('.')[2]}.{own.__name__}" for auto, own in {"AutoConfig": MegaEncoderConfig, **_MODELS}.items()
}
"""Class in this file for each of transformers' automatic ones, as config.json names them."""


def register() -> None:
    """Make the automatic classes of transformers choose the classes here, over those of any other copy of this file.

    transformers 4 has a MEGA, which cannot read sequences of some lengths. The mapping rather than AutoConfig registers the
    types, because AutoConfig demands one class for each.
    """
    for kind in (MegaEncoderConfig.model_type, OWN_TYPE):
        transformers.CONFIG_MAPPING.register(kind, MegaEncoderConfig, exist_ok=True)
    for auto, model in _MODELS.items():
        getattr(transformers, auto).register(MegaEncoderConfig, model, exist_ok=True)


register()
