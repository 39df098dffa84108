"""Numbers of tokens and of asked positions rounded up, so that shapes recur from step to step.

Unpadded batches have another number of tokens each time. On a CPU oneDNN compiles, and keeps, a matrix product for each shape
that it has not seen; on a GPU kernels are chosen by shape, and compiled graphs are specialised by it.
"""

from dataclasses import replace

import torch.nn.functional as F

from modernenc.data.masking import MicroBatch

MULTIPLE = 64


def rounded(batch: MicroBatch) -> MicroBatch:
    """The batch with a document of nothing at its end, and positions at its beginning asked for again after the last.

    What `target_positions` yields beyond the number of targets is to be dropped, so that no gradient comes of it.
    """
    tokens = len(batch.input_ids)
    more, again = -tokens % MULTIPLE, -len(batch.target_positions) % MULTIPLE
    if more:
        batch = replace(
            batch,
            input_ids=F.pad(batch.input_ids, (0, more)),
            cu_seqlens=F.pad(batch.cu_seqlens, (0, 1), value=tokens + more),
            max_seqlen=max(batch.max_seqlen, more),
        )
    return replace(batch, target_positions=F.pad(batch.target_positions, (0, again)))
