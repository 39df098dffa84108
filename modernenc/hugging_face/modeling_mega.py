"""MEGA for transformers, on the very code that trained it. An exported model carries this file and what it imports.

- transformers 4 has a MEGA of its own. Model type and weight names are the same, so it loads an export natively. Where its
  MEGA would compute something else, the model type is `OWN_TYPE`, which only loads with `trust_remote_code=True`.
- transformers 5 has none. `trust_remote_code=True`, or importing this module, brings it back.
- Any length works, and any mask of ones and zeros. Chunks are counted from the first token that the mask keeps, so padding on
  either side changes nothing.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from modernenc.backbones.gated_attention import chunks_of
from modernenc.backbones.initial import INIT_STD
from modernenc.backbones.mega import Mega
from modernenc.kernels.buckets import Buckets
from modernenc.kernels.device import lengths_of
from modernenc.kernels.documents import Documents
from modernenc.kernels.dropout import Dropout
from modernenc.shapes import Float, Int

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50_265,
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "intermediate_size": 2_304,
    "nffn_hidden_size": 2_304,
    "shared_representation_size": 192,
    "ema_projection_size": 32,
    "chunk_size": 1_024,
    "normalization_type": "scalenorm",
    "attention_activation": "softmax",
    "relative_positional_bias": "simple",
    "normalize_attention": False,
    "two_hop_residual": False,
    "dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "nffn_activation_dropout_prob": 0.1,
    "ema": "scan",
}

OWN_TYPE = "modernenc-mega"
"""Model type of a MEGA that transformers 4 would misread as its own."""


class MegaConfig(PretrainedConfig):
    """The backbone's settings under transformers' names, and those that transformers' MEGA does not know."""

    model_type = "mega"

    def __init__(
        self,
        max_positions: int = 16_384,
        use_chunking: bool = True,
        add_lm_hidden_dense_layer: bool = True,
        classifier_dropout: float | None = None,
        pad_token_id: int = 1,
        bos_token_id: int = 0,
        eos_token_id: int = 2,
        tie_word_embeddings: bool = True,
        **settings: Any,
    ) -> None:
        # transformers 5 leaves these to each configuration; without the last it would untie the decoder silently.
        own = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        own["tie_word_embeddings"] = tie_word_embeddings
        for name, value in own.items():
            setattr(self, name, value)
        self.max_positions = max_positions
        self.use_chunking = use_chunking
        self.add_lm_hidden_dense_layer = add_lm_hidden_dense_layer
        self.classifier_dropout = classifier_dropout
        super().__init__(**{**own, **_DEFAULTS, **settings})

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
        settings = {key: getattr(self, key) for key in _DEFAULTS}
        if not self.use_chunking:
            settings["chunk_size"] = self.max_positions
        return Mega(**settings, max_position=self.max_positions)


class MegaPreTrainedModel(PreTrainedModel):
    """What all models with a MEGA backbone share."""

    config_class = MegaConfig
    base_model_prefix = "mega"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise new heads; the backbone initialises itself."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INIT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class MegaModel(MegaPreTrainedModel):
    """The MEGA encoder, which returns hidden states and, if built with a pooler, the pooled first token."""

    def __init__(self, config: MegaConfig, add_pooling_layer: bool = True) -> None:
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
        """Return hidden states, which are zero where `attention_mask` is. Attention probabilities are never returned."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        # Pack the rows: only kept tokens, documents end to end, as the backbone was trained.
        embeds = self.embedding_layer.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        kept = torch.ones(embeds.shape[:2], device=embeds.device) if attention_mask is None else attention_mask
        kept = kept.bool()
        lengths = kept.sum(1)
        ends = torch.nn.functional.pad(lengths[lengths > 0].cumsum(0), (1, 0)).int()
        documents = Documents(lengths_of(ends), embeds.device)
        chunks: Buckets = chunks_of(documents, self.chunk_size)
        hidden = embeds[kept]
        all_hidden = [embeds]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(layer.__call__, hidden, documents, chunks)
            else:
                hidden = layer(hidden, documents, chunks)
            if output_hidden_states:
                all_hidden.append(_padded(hidden, kept))
        last = _padded(hidden, kept)
        return _result(
            BaseModelOutputWithPoolingAndCrossAttentions,
            return_dict,
            last_hidden_state=last,
            pooler_output=self.pooler(last) if self.pooler is not None else None,
            hidden_states=tuple(all_hidden) if output_hidden_states else None,
        )


class MegaForMaskedLM(MegaPreTrainedModel):
    """Logits of every id at every token."""

    # transformers 4 would accept a list; 5 needs to know which weight is tied to which.
    _tied_weights_keys = {"mlm_head.weight": "mega.embedding_layer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder, whose weight is the token embedding."""
        return self.mlm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the decoder."""
        self.mlm_head = new_embeddings

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, return_dict: Any = None, **others: Any
    ) -> Any:
        """Return logits and, given `labels`, the mean cross-entropy over those that are not -100."""
        out = self.mega(input_ids, attention_mask, **others)
        logits = self.mlm_head(self.dense(out.last_hidden_state).tanh())
        return _result(MaskedLMOutput, return_dict, loss=_loss(logits, labels), logits=logits, hidden_states=out.hidden_states)


class MegaForSequenceClassification(MegaPreTrainedModel):
    """One label or number per sequence, from its first token."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.classifier = ClassificationHead(config)
        self.post_init()

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, return_dict: Any = None, **others: Any
    ) -> Any:
        """Return logits and a loss: squared error for one label, cross-entropy, or one yes-or-no per label for floats."""
        out = self.mega(input_ids, attention_mask, **others)
        logits = self.classifier(out.last_hidden_state)
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = nn.functional.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
        elif labels is not None and labels.is_floating_point():
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        else:
            loss = _loss(logits, labels)
        return _result(SequenceClassifierOutput, return_dict, loss=loss, logits=logits, hidden_states=out.hidden_states)


class MegaForTokenClassification(MegaPreTrainedModel):
    """One label per token."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dropout = Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # pyright: ignore[reportArgumentType]
        self.post_init()

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, return_dict: Any = None, **others: Any
    ) -> Any:
        """Return logits and, given `labels`, the mean cross-entropy over those that are not -100."""
        out = self.mega(input_ids, attention_mask, **others)
        logits = self.classifier(self.dropout(out.last_hidden_state))
        return _result(
            TokenClassifierOutput, return_dict, loss=_loss(logits, labels), logits=logits, hidden_states=out.hidden_states
        )


class MegaForMultipleChoice(MegaPreTrainedModel):
    """A choice among sequences, `(batch, choices, length)`, by their pooled first tokens."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.mega = MegaModel(config)
        self.dropout = Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
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
        """Return scores, `(batch, choices)`, and, given `labels`, their cross-entropy."""
        given = input_ids if input_ids is not None else inputs_embeds
        flat = [None if part is None else part.flatten(0, 1) for part in (input_ids, attention_mask, inputs_embeds)]
        out = self.mega(*flat, **others)
        logits = self.classifier(self.dropout(out.pooler_output)).view(given.shape[:2])
        return _result(
            MultipleChoiceModelOutput, return_dict, loss=_loss(logits, labels), logits=logits, hidden_states=out.hidden_states
        )


class Pooler(nn.Module):
    """First token, dense layer, tanh."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Float[torch.Tensor, "batch length hidden"]) -> Float[torch.Tensor, "batch hidden"]:
        return self.dense(hidden[:, 0]).tanh()


class ClassificationHead(nn.Module):
    """First token, dense layer, tanh, and a linear map to labels."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(_classifier_dropout(config))
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)  # pyright: ignore[reportArgumentType]

    def forward(self, hidden: Float[torch.Tensor, "batch length hidden"]) -> Float[torch.Tensor, "batch labels"]:
        return self.out_proj(self.dropout(self.dense(self.dropout(hidden[:, 0])).tanh()))


def _classifier_dropout(config: MegaConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def _loss(logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
    if labels is None:
        return None
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


def _result(kind: Any, return_dict: bool | None, **fields: Any) -> Any:
    out = kind(**fields)
    return out.to_tuple() if return_dict is False else out


def _padded(hidden: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Put packed tokens back into their rows; padding is zero."""
    out = hidden.new_zeros(*kept.shape, hidden.shape[-1])
    out[kept] = hidden
    return out


_MODELS = {
    AutoModel: MegaModel,
    AutoModelForMaskedLM: MegaForMaskedLM,
    AutoModelForSequenceClassification: MegaForSequenceClassification,
    AutoModelForTokenClassification: MegaForTokenClassification,
    AutoModelForMultipleChoice: MegaForMultipleChoice,
}
AUTO_MAP = {
    auto.__name__: f"{__name__.rpartition('.')[2]}.{own.__name__}" for auto, own in {AutoConfig: MegaConfig, **_MODELS}.items()
}
"""Class in this file for each of transformers' automatic ones, as config.json names them."""

try:
    AutoConfig.register("mega", MegaConfig)
except ValueError:  # the name is taken by transformers 4
    pass
else:
    for auto, model in _MODELS.items():
        auto.register(MegaConfig, model)
