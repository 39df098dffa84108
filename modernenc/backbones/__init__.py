"""Backbones: `forward(input_ids, cu_seqlens, max_seqlen) -> hidden`, one file and one YAML each.

The contract, tested over every `conf/backbone/*.yaml`: documents laid end to end never see each other; where hidden states are
asked for at some positions only, the last block leaves out what the others would need; `PHASE_ATTRIBUTES` names
what a phase may set; `blocks()` are its layers; `matrices()` lists what an optimizer may orthogonalise; `prediction_head()`
builds the masked-LM head.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@runtime_checkable
class Backbone(Protocol):
    """What the rest of the package asks of a backbone."""

    PHASE_ATTRIBUTES: ClassVar[tuple[str, ...]]
    HUGGING_FACE_NAMES: ClassVar[dict[str, str]]
    """What names of weights begin with, here and in transformers' masked-LM model, where they differ."""
    HUGGING_FACE_TYPES: ClassVar[tuple[str, ...]]
    """The `model_type`s of transformers that `settings_from_hugging_face` reads."""
    HUGGING_FACE_FIXED: ClassVar[dict[str, Any]]
    """What is the same in every one here, by the keys of transformers' config.json."""
    HUGGING_FACE_IRRELEVANT: ClassVar[tuple[str, ...]]
    """Keys there that change no logit."""
    MAY_DIFFER: ClassVar[tuple[str, ...]]
    """Arguments that need not be those of a model whose weights it begins with: sizes, which these are fitted to, and what no
    logit depends on."""
    vocab_size: int
    hidden_size: int
    max_position: int

    def __call__(
        self,
        input_ids: Int[Tensor, " tokens"],
        cu_seqlens: Int[Tensor, " docs_plus_1"],
        max_seqlen: int,
        positions: Int[Tensor, " some"] | None = None,
    ) -> Float[Tensor, "_ hidden"]:
        """Hidden states of documents laid end to end, at all tokens or at `positions`.

        `cu_seqlens` may lie on the CPU, as that of a batch does, so that nobody waits for a GPU to tell. ValueError when a
        document is longer than `max_position`.
        """
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module."""
        ...

    def token_embeddings(self) -> nn.Embedding:
        """The embedding that the masked-LM decoder shares."""
        ...

    def prediction_head(self) -> nn.Module:
        """A new head from hidden states to what the decoder reads."""
        ...

    def blocks(self) -> list[nn.Module]:
        """The layers, each of which may be split over ranks by itself."""
        ...

    def compilable(self) -> list[nn.Module]:
        """The largest parts that are one graph for torch's compiler on a GPU, whatever the documents."""
        ...

    def matrices(self) -> list[nn.Parameter]:
        """Weights that an optimizer like Muon may orthogonalise: no embedding, no decoder."""
        ...

    def flops(self, length: int) -> float:
        """Of the matrix products of a forward pass, per token in documents of `length` tokens."""
        ...

    def layer_kinds(self) -> list[str]:
        """What each block attends to, in words that are the same for blocks that could take each other's weights."""
        ...

    def parts(self, name: str) -> tuple[int, ...]:
        """Rows of each of the matrices that lie one above the other in the named weight; none, when it is one."""
        ...

    @classmethod
    def settings_from_hugging_face(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The arguments that a config.json of transformers, 4 or 5, describes; ValueError for values that are none of them.

        Keys that it does not ask for are looked after by `modernenc.config_json`.
        """
        ...

    def path(self, device: torch.device, dtype: torch.dtype) -> str:
        """Which of its equal ways to one result it takes, for the log."""
        ...

    def hugging_face_model(self, **special_ids: Any) -> "PreTrainedModel":
        """The same masked-LM model for transformers, of the shape only; `special_ids` are keys of its configuration."""
        ...
