"""Rows -> micro-batches for causal language modelling, in which each text token is predicted from those before it."""

from collections.abc import Sequence

from modernenc.curriculum import CAUSAL_LM
from modernenc.data.batch import MicroBatch
from modernenc.data.blocks import Roles
from modernenc.data.lanes import Row
from modernenc.data.masking import lay_out


def next_token_batch(rows: Sequence[Row], roles: Roles, first_row: int) -> MicroBatch:
    """Lay rows end to end; hidden states are needed before each text token, of which the first follows cls."""
    input_ids, ends, is_text = lay_out(rows, roles)
    text = is_text.nonzero()[0]
    return MicroBatch.of(input_ids, ends, text - 1, input_ids[text], first_row, CAUSAL_LM)
