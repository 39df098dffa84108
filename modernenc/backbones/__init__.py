"""Backbones: `forward(input_ids, cu_seqlens, max_seqlen) -> hidden`, one Python file and one YAML each.

A backbone is an `nn.Module` that meets `Backbone`, and `conf/backbone/NAME.yaml` names its class and arguments. The contract
test runs over every such YAML: documents that share a batch never see each other, hidden states at some positions equal those
of all, and so on. Converters to transformers' models are in `modernenc.hugging_face`, fast kernels in `modernenc.kernels`.
"""

from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from modernenc.backbones.description import Description


@runtime_checkable
class Backbone(Protocol):
    """All that the rest of the package needs of a backbone, besides its being an `nn.Module`.

    A class may have more attributes: `HUGGING_FACE`, the dotted name of its `modernenc.hugging_face.Converter`; `is_compiled`,
    which is set when its layers are compiled; `decoder_bias` and `tie_word_embeddings`, both true unless it says otherwise.
    """

    PHASE_ATTRIBUTES: ClassVar[tuple[str, ...]]
    """Attributes that a phase of the curriculum may set."""
    vocab_size: int
    hidden_size: int
    max_position: int

    def __call__(
        self,
        input_ids: Int[Tensor, " tokens"],
        cu_seqlens: Int[Tensor, " docs_plus_1"],
        max_seqlen: int,
        positions: Int[Tensor, " some"] | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "_ hidden"]:
        """Return hidden states of packed documents, at all tokens or at `positions`.

        If `causal`, those of a token depend on no later one, as in a decoder; a backbone without this argument trains masked LM
        alone. `cu_seqlens` may lie on the CPU, as in a `MicroBatch`, so that its values are known without waiting for a GPU.
        With `positions`, the last layer may skip what only other tokens need. Raises ValueError when a document is longer than
        `max_position`.
        """
        ...

    def token_embeddings(self) -> nn.Embedding:
        """Return the embedding, which the masked-LM decoder shares."""
        ...

    def prediction_head(self) -> nn.Module:
        """Build a new head, from hidden states to what the decoder reads."""
        ...

    def describe(self) -> Description:
        """Describe the backbone as built."""
        ...
