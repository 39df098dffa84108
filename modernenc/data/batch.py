"""A micro-batch: packed documents without row padding, with sizes that are multiples of 64.

Unpadded batches have another number of tokens each time. On a CPU, oneDNN compiles and keeps a matrix product for each shape
that it has not seen; on a GPU kernels are chosen by shape. So tokens and target positions are padded here, once, where batches
are made: shapes repeat from step to step, and models and objectives need not know.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from modernenc.curriculum import MASKED_LM, OF_TEXT

MULTIPLE = 64
"""The numbers of tokens and of target positions are padded to a multiple of this."""


@dataclass
class MicroBatch:
    """Documents laid end to end, and what is to be predicted."""

    input_ids: Int[Tensor, " padded_tokens"]
    cu_seqlens: Int[Tensor, " docs_plus_1"]
    """Start of each document, then the total; int32. Padding is further documents at the end, none longer than a real one."""
    max_seqlen: int
    target_positions: Int[Tensor, " padded_positions"]
    """Where hidden states are needed: at each predicted token, in causal LM before it; for a task, at the first token of each
    choice. Padding points at token 0, and its hidden states are to be ignored."""
    targets: Int[Tensor, " targets"]
    """Labels, without padding: the original token at each position, the token after it, or the index of each item's correct
    choice."""
    num_tokens: int
    """Tokens of the documents, without padding."""
    first_row: int
    """Number of the first row in its phase. Dropout is seeded by it and the step."""
    objective: str = MASKED_LM

    @classmethod
    def of(
        cls,
        input_ids: Integer[np.ndarray, " tokens"],
        ends: Integer[np.ndarray, " docs_plus_1"],
        target_positions: Integer[np.ndarray, " positions"],
        targets: Integer[np.ndarray, " targets"],
        first_row: int = 0,
        objective: str = MASKED_LM,
    ) -> "MicroBatch":
        """Pad and wrap arrays; `ends` are 0 and the end of each document."""
        tokens = len(input_ids)
        more, positions = -tokens % MULTIPLE, -len(target_positions) % MULTIPLE
        # A document of padding that is longer than the others could exceed the positions that a small backbone has.
        longest = int(np.diff(ends).max())
        ends = np.concatenate([ends, np.arange(tokens + longest, tokens + more, longest), [tokens + more] if more else []])
        return cls(
            input_ids=torch.from_numpy(np.append(input_ids, np.zeros(more, np.int64))),
            cu_seqlens=torch.from_numpy(ends.astype(np.int32)),
            max_seqlen=longest,
            target_positions=torch.from_numpy(np.append(target_positions, np.zeros(positions, np.int64))),
            targets=torch.from_numpy(targets),
            num_tokens=tokens,
            first_row=first_row,
            objective=objective,
        )

    def unpadded(self) -> "MicroBatch":
        """Return the same documents and positions without padding, as statistics and comparisons need them.

        For a task, the positions are those of the first token of every document.
        """
        ends = self.cu_seqlens[self.cu_seqlens <= self.num_tokens]
        is_text = self.objective in OF_TEXT
        positions = len(self.targets) if is_text else (len(ends) - 1 if len(self.targets) else 0)
        return replace(
            self,
            input_ids=self.input_ids[: self.num_tokens],
            cu_seqlens=ends,
            max_seqlen=int(ends.diff().max()),
            target_positions=self.target_positions[:positions],
        )

    def to(self, device: torch.device) -> "MicroBatch":
        """Copy to a device, except `cu_seqlens`: layouts derived from it are computed on the CPU."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        """Copy into memory from which a GPU can copy while it computes."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "MicroBatch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name != "cu_seqlens"}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the tensors as one array of 32 bits, which hold all values: token ids, positions and labels.

        By itself torch would pass each tensor to another process in its own piece of shared memory, of which a container has
        little, through its own file descriptor, of which a process has few.
        """
        tensors = [self.input_ids.numpy(), self.cu_seqlens.numpy(), self.target_positions.numpy(), self.targets.numpy()]
        others = (self.max_seqlen, self.num_tokens, self.first_row, self.objective)
        return _unpickle, (np.concatenate(tensors, dtype=np.int32), [len(tensor) for tensor in tensors], *others)


def _unpickle(values: np.ndarray, sizes: list[int], max_seqlen: int, *others: Any) -> MicroBatch:
    """Undo `MicroBatch.__reduce__`."""
    input_ids, cu_seqlens, target_positions, targets = torch.from_numpy(values).split(sizes)
    return MicroBatch(input_ids.long(), cu_seqlens, max_seqlen, target_positions.long(), targets.long(), *others)
