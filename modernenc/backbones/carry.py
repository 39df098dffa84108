"""The EMA's states from block to block as one Triton kernel: each state is read once and written once.

`ema` does the same by rounds that reach twice as far each, which any device can but which read and write all states in each.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, BLOCKS = 16, 64
"""Of a tile: states, and blocks of tokens."""


@torch.library.custom_op("modernenc::carry", mutates_args={"out"})
def run(leaving: Tensor, decay: Tensor, same: Tensor, out: Tensor, ahead: bool) -> None:
    """Fill `out[b] = leaving[b-1] + decay out[b-1]` within documents, or with `b+1` for `b-1` when not `ahead`.

    `leaving` and `out` are (hidden, states, blocks), `decay` is (hidden, states), all of fp32; `same`, one shorter than there
    are blocks, says of each whether the next is of the same document.
    """
    hidden, states, blocks = leaving.shape
    rows = hidden * states
    kernel: Any = _carry[triton.cdiv(rows, ROWS),]
    kernel(
        leaving, *leaving.stride(), decay, *decay.stride(), same.to(torch.int8), out, *out.stride(),
        states, rows, blocks, AHEAD=ahead, ROWS=ROWS, BLOCKS=BLOCKS,
    )  # fmt: skip


@run.register_fake
def _(leaving: Tensor, decay: Tensor, same: Tensor, out: Tensor, ahead: bool) -> None:
    """What there is to know of shapes: nothing new."""


@triton.jit
def _then(decay, state, more_decay, more_state):
    return decay * more_decay, more_decay * state + more_state


@triton.jit
def _carry(
    leaving, leaving_hidden, leaving_state, leaving_block, decay, decay_hidden, decay_state, same, out, out_hidden, out_state,
    out_block, states, rows, blocks, AHEAD: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program has some states, and goes over all blocks, in the order in which they depend on each other."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel, number = (row // states).to(tl.int64), row % states
    there = row < rows
    decays = tl.load(decay + channel * decay_hidden + number * decay_state, there, 0.0)
    leaving += (channel * leaving_hidden + number * leaving_state)[:, None]
    out += (channel * out_hidden + number * out_state)[:, None]
    carried = tl.zeros([ROWS], tl.float32)
    for first in range(0, blocks, BLOCKS):
        place = first + tl.arange(0, BLOCKS)
        block = place if AHEAD else blocks - 1 - place
        before = block - 1 if AHEAD else block + 1
        reached = (place > 0) & (place < blocks)
        kept = tl.load(same + tl.minimum(block, before), reached, 0) != 0
        share = tl.where(kept[None, :], decays[:, None], 0.0)
        state = tl.load(leaving + before[None, :] * leaving_block, there[:, None] & kept[None, :], 0.0)
        shares, sums = tl.associative_scan((share, state), 1, _then)
        arriving = sums + shares * tl.expand_dims(carried, 1)
        tl.store(out + block[None, :] * out_block, arriving, there[:, None] & (place < blocks)[None, :])
        carried = tl.sum(tl.where((place == first + BLOCKS - 1)[None, :], arriving, 0.0), 1)
