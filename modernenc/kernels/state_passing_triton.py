"""State passing between segments as one Triton kernel, which reads and writes each state once.

`state_passing` says what is computed, and computes the same by doubling rounds on any device.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_STATES, TILE_SEGMENTS = 16, 64
"""Size of the tile that a program works on at a time."""


@torch.library.custom_op("modernenc::pass_states", mutates_args={"out"})
def run(outgoing: Tensor, decay: Tensor, same: Tensor, out: Tensor, forward: bool) -> None:
    """Fill `out[b] = outgoing[b-1] + decay * out[b-1]` within each document, or with b+1 for b-1 unless `forward`.

    `outgoing` and `out` are (hidden, states, segments), `decay` is (hidden, states), all in fp32. `same`, one shorter than
    there are segments, says whether a segment and the next one belong to the same document.
    """
    hidden, states, segments = outgoing.shape
    rows = hidden * states
    kernel: Any = _pass_states[triton.cdiv(rows, TILE_STATES),]
    kernel(
        outgoing, *outgoing.stride(), decay, *decay.stride(), same.to(torch.int8), out, *out.stride(),
        states, rows, segments, FORWARD=forward, ROWS=TILE_STATES, SEGMENTS=TILE_SEGMENTS,
    )  # fmt: skip


@run.register_fake
def _(outgoing: Tensor, decay: Tensor, same: Tensor, out: Tensor, forward: bool) -> None:
    """Tell torch that tracing the operator creates no tensor."""


@triton.jit
def _compose(decay, state, more_decay, more_state):
    return decay * more_decay, more_decay * state + more_state


@triton.jit
def _pass_states(
    outgoing, outgoing_hidden, outgoing_state, outgoing_segment, decay, decay_hidden, decay_state, same,
    out, out_hidden, out_state, out_segment, states, rows, segments,
    FORWARD: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Each program owns ROWS states and walks over all segments, in the order in which they depend on each other.

    One step of the recurrence is an affine map of the state; maps compose associatively, so a tile is one associative scan.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel, number = (row // states).to(tl.int64), row % states
    there = row < rows
    decays = tl.load(decay + channel * decay_hidden + number * decay_state, there, 0.0)
    outgoing += (channel * outgoing_hidden + number * outgoing_state)[:, None]
    out += (channel * out_hidden + number * out_state)[:, None]
    carried = tl.zeros([ROWS], tl.float32)  # the state that enters the tile's first segment
    for first in range(0, segments, SEGMENTS):
        place = first + tl.arange(0, SEGMENTS)
        segment = place if FORWARD else segments - 1 - place
        before = segment - 1 if FORWARD else segment + 1
        reached = (place > 0) & (place < segments)
        kept = tl.load(same + tl.minimum(segment, before), reached, 0) != 0
        factor = tl.where(kept[None, :], decays[:, None], 0.0)  # 0 at the start of a document
        state = tl.load(outgoing + before[None, :] * outgoing_segment, there[:, None] & kept[None, :], 0.0)
        factors, sums = tl.associative_scan((factor, state), 1, _compose)
        incoming = sums + factors * tl.expand_dims(carried, 1)
        tl.store(out + segment[None, :] * out_segment, incoming, there[:, None] & (place < segments)[None, :])
        carried = tl.sum(tl.where((place == first + SEGMENTS - 1)[None, :], incoming, 0.0), 1)
