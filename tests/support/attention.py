"""Plain softmax attention to hold other implementations against, and inputs for both."""

from collections.abc import Sequence

import torch

from modernenc.backbones.attention import VarlenInfo
from modernenc.backbones.rotary import Rotation, positions_of, rotate, rotation

LENGTHS = [1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 200, 511, 513, 600]
"""Lengths of documents around the sizes of tiles, in tokens."""


def inputs(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    lengths: Sequence[int] = LENGTHS,
    heads: int = 5,
    causal: bool = False,
) -> tuple[torch.Tensor, Rotation, VarlenInfo]:
    """Return random queries, keys and values of packed documents, their rotation and their layout."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    qkv = torch.randn(total, 3, heads, 32, generator=generator).to(device, dtype).requires_grad_()
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    turn = rotation(10_000, 32, positions_of(ends, total), max(lengths))
    return qkv, turn, VarlenInfo(ends, max(lengths), total, qkv.device, causal)


def plain(qkv: torch.Tensor, turn: Rotation, layout: VarlenInfo, window: int | tuple[int, int] | None) -> torch.Tensor:
    """Compute softmax attention one document at a time, in the precision of the input.

    `window` says how many tokens before and after itself a token sees, in one number if they are as many; None means all. None
    after it are seen in a causal layout.
    """
    left, right = window if isinstance(window, tuple) else (window, window)
    if layout.causal:
        left, right = layout.max_seqlen if left is None else left, 0
    outs = []
    for start, end in zip(layout.cu_seqlens[:-1].tolist(), layout.cu_seqlens[1:].tolist(), strict=True):
        here = Rotation(turn.cos[start:end], turn.sin[start:end])
        q, k, v = qkv[start:end].unbind(1)
        q, k, v = (x.transpose(0, 1) for x in (rotate(q, here), rotate(k, here), v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        place = torch.arange(end - start, device=q.device)
        if left is not None and right is not None:
            distance = place - place[:, None]
            scores = scores.masked_fill((distance < -left) | (distance > right), float("-inf"))
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs)


def gradient(out: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a random weighting of the output."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return torch.autograd.grad((out * weight).sum(), qkv)[0]
