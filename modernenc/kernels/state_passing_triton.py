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


@torch.library.custom_op("modernenc::pass_states", mutates_args=())
def run(outgoing: Tensor, decay: Tensor, same: Tensor, first_forward: bool) -> Tensor:
    """Return `incoming[b] = outgoing[b-1] + decay * incoming[b-1]` within each document, or with b+1 for b-1.

    The first half of the states runs forward and the second backward, or the other way round unless `first_forward`. `outgoing`
    is (hidden, states, segments), `decay` is (hidden, states), both in fp32. `same`, one shorter than there are segments, says
    whether a segment and the next one belong to the same document.
    """
    hidden, states, segments = outgoing.shape
    half, incoming = states // 2, torch.empty_like(outgoing, memory_format=torch.contiguous_format)
    kernel: Any = _pass_states[triton.cdiv(hidden * half, TILE_STATES), 2]
    kernel(
        outgoing, *outgoing.stride(), decay, *decay.stride(), same.view(torch.int8), incoming,
        half, hidden * half, segments, FIRST_FORWARD=first_forward, ROWS=TILE_STATES, SEGMENTS=TILE_SEGMENTS,
    )  # fmt: skip
    return incoming


@run.register_fake
def _(outgoing: Tensor, decay: Tensor, same: Tensor, first_forward: bool) -> Tensor:
    """Tell torch the shape of the result."""
    return torch.empty_like(outgoing, memory_format=torch.contiguous_format)


@triton.jit
def _compose(decay, state, more_decay, more_state):
    return decay * more_decay, more_decay * state + more_state


@triton.jit
def _pass_states(
    outgoing, outgoing_hidden, outgoing_state, outgoing_segment, decay, decay_hidden, decay_state, same, incoming,
    half, rows, segments, FIRST_FORWARD: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Each program owns ROWS states and walks over all segments, in the order in which they depend on each other.

    Programs of the first half of the states run one way, those of the second half the other. One step of the recurrence is an
    affine map of the state; maps compose associatively, so a tile is one associative scan.
    """
    row, second = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    forward = (second == 0) == FIRST_FORWARD
    channel, number = (row // half).to(tl.int64), row % half + second * half
    there = row < rows
    decays = tl.load(decay + channel * decay_hidden + number * decay_state, there, 0.0)
    outgoing += (channel * outgoing_hidden + number * outgoing_state)[:, None]
    incoming += ((channel * 2 * half + number) * segments)[:, None]
    carried = tl.zeros([ROWS], tl.float32)  # the state that enters the tile's first segment
    for first in range(0, segments, SEGMENTS):
        place = first + tl.arange(0, SEGMENTS)
        segment = tl.where(forward, place, segments - 1 - place)
        before = tl.where(forward, segment - 1, segment + 1)
        reached = (place > 0) & (place < segments)
        kept = tl.load(same + tl.minimum(segment, before), reached, 0) != 0
        factor = tl.where(kept[None, :], decays[:, None], 0.0)  # 0 at the start of a document
        state = tl.load(outgoing + before[None, :] * outgoing_segment, there[:, None] & kept[None, :], 0.0)
        factors, sums = tl.associative_scan((factor, state), 1, _compose)
        entering = sums + factors * tl.expand_dims(carried, 1)
        tl.store(incoming + segment[None, :], entering, there[:, None] & (place < segments)[None, :])
        carried = tl.sum(tl.where((place == first + SEGMENTS - 1)[None, :], entering, 0.0), 1)
