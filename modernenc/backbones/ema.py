"""Multi-dimensional damped EMA, both directions, restarted at each document: Ma et al. 2022, arXiv:2209.10655, equation 2.

Each channel of the input drives, in either direction, some scalar states `s[t] = q s[t-1] + x[t]`, whose weighted sum is the
output: a convolution with the kernel `k[l] = sum of gain q^l`. Three paths with equal results, all in fp32:

- `scan`: blocks of 64 tokens by matrix products, states carried from block to block in log(blocks) rounds. Linear in length.
- `fft`: each document by circular convolution.
- `recurrence`: the definition, token by token.
"""

import math
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .initial import normal_
from .shapes import Bool, Float, Int
from .transfer import on_gpu, sent

KERNEL = f"{__package__}.carry"
"""Carries states on a GPU, where there is Triton; an exported model goes without."""
HAS_KERNEL = bool(find_spec("triton") and find_spec(KERNEL))
BLOCK = 64
"""Tokens of a block: its Toeplitz matrices cost BLOCK multiplications per token and channel."""


class Kernel(NamedTuple):
    """What the EMA of a layer computes; the first direction looks back, the second ahead."""

    log_decay: Float[Tensor, "2 hidden states"]
    """log q, below 0."""
    gain: Float[Tensor, "2 hidden states"]


class Documents:
    """Documents laid end to end, and how they lie on whole blocks, with zeros after the end of each."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self.device = device
        self._blocks = [-(-length // BLOCK) for length in lengths]

    @cached_property
    def blocks(self) -> int:
        """How many blocks there are."""
        return sum(self._blocks)

    @cached_property
    def longest(self) -> int:
        """Blocks of the longest document."""
        return max(self._blocks)

    @cached_property
    def place(self) -> Int[Tensor, " tokens"] | None:
        """Where each token lies; None where documents fill their blocks, so that all lie where they are."""
        if all(length % BLOCK == 0 for length in self.lengths):
            return None
        lengths = np.array(self.lengths)
        gaps = np.roll((-lengths % BLOCK).cumsum(), 1)
        gaps[0] = 0
        return sent(np.arange(lengths.sum()) + gaps.repeat(lengths), self.device)

    def may_reach(self, step: int) -> Bool[Tensor, " blocks"]:
        """Whether a block and the one `step` before it are of one document; the first `step` are left out."""
        return self._number[step:] >= step

    @cached_property
    def _number(self) -> Int[Tensor, " blocks"]:
        """Number of each block in its document."""
        return sent(np.concatenate([np.arange(count) for count in self._blocks]), self.device)


class MultiDimensionDampedEMA(nn.Module):
    """`silu(EMA(x) + omega x)`; parameter names and initial values are those of transformers' MEGA.

    `path` is one of `PATHS`.
    """

    def __init__(self, hidden_size: int, states: int, path: str = "scan") -> None:
        super().__init__()
        self.path = path
        self.damping_factor = nn.Parameter(torch.empty(2 * hidden_size, states, 1))
        self.decay_factor = nn.Parameter(torch.empty(2 * hidden_size, states, 1))
        self.ema_expansion_matrix = nn.Parameter(torch.empty(2 * hidden_size, states, 1))
        self.kernel_projection_matrix = nn.Parameter(torch.empty(2 * hidden_size, states))
        self.residual_weight = nn.Parameter(torch.empty(hidden_size))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Memories of a few tokens, with gains of alternating sign."""
        normal_(self.damping_factor, 0.2)
        normal_(self.decay_factor, 0.2)
        normal_(self.ema_expansion_matrix, 0.02)
        self.ema_expansion_matrix[:, ::2] += 1
        self.ema_expansion_matrix[:, 1::2] -= 1
        normal_(self.kernel_projection_matrix, 1.0)
        normal_(self.residual_weight, 1.0)

    def forward(self, x: Float[Tensor, "tokens hidden"], documents: Documents) -> Float[Tensor, "tokens hidden"]:
        """Output in fp32 at least, whatever the input's precision: powers of decays next to 1 need it."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return F.silu(PATHS[self.path](x, self.kernel(x.dtype), documents) + x * self.residual_weight.to(x.dtype))

    def kernel(self, dtype: torch.dtype) -> Kernel:
        """Decays and gains; with log1p, since 1 - p a next to 1 would lose the bits that long memories are made of."""
        damping = self.damping_factor.squeeze(-1).to(dtype).sigmoid()
        forgotten = (damping * self.decay_factor.squeeze(-1).to(dtype).sigmoid()).clamp(max=1 - 1e-7)
        gain = damping * self.ema_expansion_matrix.squeeze(-1).to(dtype) * self.kernel_projection_matrix.to(dtype)
        log_decay = torch.log1p(-forgotten)
        return Kernel(log_decay.unflatten(0, (2, -1)), (gain / math.sqrt(gain.shape[-1])).unflatten(0, (2, -1)))


def scan(x: Float[Tensor, "tokens hidden"], kernel: Kernel, documents: Documents) -> Float[Tensor, "tokens hidden"]:
    """By blocks: a Toeplitz matrix inside each, and the states that arrive from the blocks before and after."""
    powers = (kernel.log_decay[..., None] * torch.arange(BLOCK + 1, device=x.device)).exp()  # (2, hidden, states, BLOCK + 1)
    back, ahead = powers
    taps = torch.einsum("dhs,dhst->dht", kernel.gain, powers[..., :BLOCK])
    both = torch.cat((taps[1, :, 1:].flip(-1), taps.sum(0)[:, :1], taps[0, :, 1:]), dim=-1)  # by distance, 1 - BLOCK and up
    inside = both.unfold(-1, BLOCK, 1).flip(-1)  # (hidden, BLOCK, BLOCK)
    gain = kernel.gain[..., None]
    leaving = torch.cat((back[..., :-1].flip(-1), ahead[..., :-1]), dim=1)  # (hidden, 2 states, BLOCK)
    arriving = torch.cat((gain[0] * back[..., 1:], gain[1] * ahead[..., 1:].flip(-1)), dim=1)
    columns = _to_blocks(x, documents).permute(2, 1, 0).contiguous()  # (hidden, BLOCK, blocks)
    out, states = (torch.cat((inside, leaving), dim=1) @ columns).split((BLOCK, leaving.shape[1]), dim=1)
    if documents.longest > 1:
        decay = powers[..., -1].transpose(0, 1).flatten(1)  # (hidden, 2 states)
        carried = _Carry.apply(states, decay, documents)
        assert isinstance(carried, Tensor)
        out = torch.baddbmm(out, arriving.transpose(1, 2), carried)
    if out.requires_grad:
        out.register_hook(Tensor.contiguous)  # else torch multiplies matrix by matrix, and copies each, in the backward pass
    flat = out.permute(2, 1, 0).reshape(-1, x.shape[1])
    return flat if documents.place is None else flat.index_select(0, documents.place)


def fft(x: Float[Tensor, "tokens hidden"], kernel: Kernel, documents: Documents) -> Float[Tensor, "tokens hidden"]:
    """By documents: one circular convolution with the kernel of both directions."""
    longest = -(-max(documents.lengths) // BLOCK)
    within, between = (torch.arange(count, device=x.device) * step for count, step in ((BLOCK, 1), (longest, BLOCK)))
    fine = (kernel.log_decay[..., None] * within).exp()
    coarse = kernel.gain[..., None] * (kernel.log_decay[..., None] * between).exp()
    back, ahead = (coarse.transpose(-1, -2) @ fine).flatten(-2)  # each (hidden, longest x BLOCK)
    outs = []
    for document in x.split(documents.lengths):
        length = len(document)
        size = 1 << (2 * length - 2).bit_length()
        gap = back.new_zeros(back.shape[0], size - 2 * length + 1)
        ring = torch.cat((back[:, :1] + ahead[:, :1], back[:, 1:length], gap, ahead[:, 1:length].flip(-1)), dim=-1)
        spectrum = torch.fft.rfft(document.T, n=size) * torch.fft.rfft(ring)
        outs.append(torch.fft.irfft(spectrum, n=size)[:, :length].T)
    return torch.cat(outs)


def recurrence(x: Float[Tensor, "tokens hidden"], kernel: Kernel, documents: Documents) -> Float[Tensor, "tokens hidden"]:
    """Token by token."""
    change = kernel.log_decay.expm1()  # q - 1, which keeps the bits that q next to 1 would lose
    outs = []
    for document in x.split(documents.lengths):
        sums = []
        for direction, tokens in enumerate((document, document.flip(0))):
            state, out = torch.zeros_like(change[direction]), []
            for token in tokens:
                state = state + (change[direction] * state + token[:, None])
                out.append((kernel.gain[direction] * state).sum(-1))
            sums.append(torch.stack(out))
        outs.append(sums[0] + sums[1].flip(0))
    return torch.cat(outs)


PATHS = {"scan": scan, "fft": fft, "recurrence": recurrence}


class _Carry(torch.autograd.Function):
    """States that arrive at each block, from those that leave its neighbours: the first half runs ahead, the second back."""

    @staticmethod
    def forward(ctx: Any, leaving: Tensor, decay: Tensor, documents: Documents) -> Tensor:
        half = leaving.shape[1] // 2
        arriving = torch.zeros_like(leaving)
        _run(leaving[:, :half], decay[:, :half], documents, arriving[:, :half], ahead=True)
        _run(leaving[:, half:], decay[:, half:], documents, arriving[:, half:], ahead=False)
        ctx.save_for_backward(arriving, decay)
        ctx.documents = documents
        return arriving

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        arriving, decay = ctx.saved_tensors
        half = decay.shape[1] // 2
        grad = torch.zeros_like(arriving)  # the adjoint runs the other way
        _run(grads[0][:, :half], decay[:, :half], ctx.documents, grad[:, :half], ahead=False)
        _run(grads[0][:, half:], decay[:, half:], ctx.documents, grad[:, half:], ahead=True)
        return grad, (grad * arriving).sum(-1), None


def _run(leaving: Tensor, decay: Tensor, documents: Documents, out: Tensor, ahead: bool) -> None:
    """Fill `out[b] = leaving[b-1] + decay out[b-1]` within documents, by rounds that reach twice as far each: Hillis 1986."""
    if on_gpu(leaving.device) and leaving.dtype == torch.float32 and HAS_KERNEL:
        return import_module(KERNEL).run(leaving, decay, documents.may_reach(1), out, ahead)
    total, step = leaving.clone(), 1
    while step < documents.longest:
        source, target = (total[..., :-step], total[..., step:]) if ahead else (total[..., step:], total[..., :-step])
        target += (source * decay[..., None]).mul_(documents.may_reach(step))
        decay, step = decay.square(), 2 * step
    source, target = (total[..., :-1], out[..., 1:]) if ahead else (total[..., 1:], out[..., :-1])
    torch.mul(source, documents.may_reach(1), out=target)


def _to_blocks(x: Tensor, documents: Documents) -> Tensor:
    if documents.place is not None:
        x = x.new_zeros(documents.blocks * BLOCK, x.shape[1]).index_copy(0, documents.place, x)
    return x.view(documents.blocks, BLOCK, x.shape[1])
