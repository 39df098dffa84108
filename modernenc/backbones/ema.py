"""Multi-dimensional damped EMA in both directions, restarted at each document: Ma et al. 2022, arXiv:2209.10655, section 3.1.

Every channel x of the input drives some scalar states h, in the paper's symbols

    h[t] = alpha beta x[t] + (1 - alpha delta) h[t-1],    y[t] = eta . h[t],

with alpha and delta in (0, 1): how much of the input enters, and how much of the past is forgotten. Nothing depends on the
input but through this sum, so y is a convolution of x with the kernel k[l] = sum over states of gain q^l, where
q = 1 - alpha delta and gain = alpha beta eta. An encoder runs it in both directions and adds the two.

`scan` computes it in fp32, at a cost that is linear in length: by matrix products inside segments of 64 tokens, and by states
that pass from segment to segment. TF32 is not enough: after 16,384 tokens of long memories the output is off by 7e-3 of 12, and
by 1e-5 in fp32, whose products take 2 % of a step on a GPU. Where the backward pass runs under autocast, as in training, its
products are in bf16, and gradients are off by 5e-3 of their size, as those of linear maps are.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernenc.backbones.initial import normal_
from modernenc.kernels.documents import SEGMENT, Documents
from modernenc.kernels.state_passing import pass_states
from modernenc.kernels.toeplitz import toeplitz
from modernenc.shapes import Float


class EMACoefficients(NamedTuple):
    """The convolution of one layer. The first direction looks back, the second ahead."""

    log_decay: Float[Tensor, "2 hidden states"]
    """log q, below 0."""
    gain: Float[Tensor, "2 hidden states"]


class MultiDimensionDampedEMA(nn.Module):
    """`silu(EMA(x) + omega x)`; parameter names and initial values are those of transformers' MEGA.

    `states` is the number of states per channel and direction, the paper's h.
    """

    def __init__(self, hidden_size: int, states: int) -> None:
        super().__init__()
        self.damping_factor = nn.Parameter(torch.empty(2 * hidden_size, states, 1))  # alpha, before its sigmoid
        self.decay_factor = nn.Parameter(torch.empty(2 * hidden_size, states, 1))  # delta, before its sigmoid
        self.ema_expansion_matrix = nn.Parameter(torch.empty(2 * hidden_size, states, 1))  # beta
        self.kernel_projection_matrix = nn.Parameter(torch.empty(2 * hidden_size, states))  # eta
        self.residual_weight = nn.Parameter(torch.empty(hidden_size))  # omega
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start with memories of a few tokens (q about 0.75), and beta of alternating sign, so that states differ."""
        normal_(self.damping_factor, 0.2)
        normal_(self.decay_factor, 0.2)
        normal_(self.ema_expansion_matrix, 0.02)
        self.ema_expansion_matrix[:, ::2] += 1
        self.ema_expansion_matrix[:, 1::2] -= 1
        normal_(self.kernel_projection_matrix, 1.0)
        normal_(self.residual_weight, 1.0)

    def forward(self, x: Float[Tensor, "tokens hidden"], documents: Documents) -> Float[Tensor, "tokens hidden"]:
        """Return the output in fp32 at least: powers of a q next to 1 need it, whatever the precision of the input."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            ema = scan(x, self.coefficients(x.dtype, documents.causal), documents)
            return F.silu(ema + x * self.residual_weight.to(x.dtype))

    def coefficients(self, dtype: torch.dtype, causal: bool = False) -> EMACoefficients:
        """Compute decays and gains; eta is scaled by 1/sqrt(states), as the published code does.

        If `causal`, the direction that looks ahead has no gain.
        """
        alpha = self.damping_factor.squeeze(-1).to(dtype).sigmoid()
        # The clamp keeps q above 0, whose logarithm would be -inf, and log1p keeps the bits of a q next to 1, which is what
        # long memories are made of: log(1 - alpha delta) is off by 1e-3 after 16,384 tokens.
        forgotten = (alpha * self.decay_factor.squeeze(-1).to(dtype).sigmoid()).clamp(max=1 - 1e-7)
        log_decay = torch.log1p(-forgotten)
        gain = alpha * self.ema_expansion_matrix.squeeze(-1).to(dtype) * self.kernel_projection_matrix.to(dtype)
        gain = (gain / math.sqrt(gain.shape[-1])).unflatten(0, (2, -1))
        if causal:
            gain = gain * torch.tensor([1.0, 0.0], device=gain.device, dtype=dtype)[:, None, None]
        return EMACoefficients(log_decay.unflatten(0, (2, -1)), gain)


def scan(x: Float[Tensor, "tokens hidden"], ema: EMACoefficients, documents: Documents) -> Float[Tensor, "tokens hidden"]:
    """Compute the moving averages of packed documents, segment by segment of 64 tokens.

    1. Inside a segment, the convolution of both directions is one Toeplitz matrix per channel.
    2. A segment affects later ones only through its states at its end, the sum over its tokens t of q^(63-t) x[t] with the
       decay q; in the other direction, through its states at its start. One matrix product computes both.
    3. States pass from segment to segment, each decaying by q^64: `modernenc.kernels.state_passing`.
    4. The states that enter a segment are read out at each of its tokens.
    """
    powers = (ema.log_decay[..., None] * torch.arange(SEGMENT + 1, device=x.device)).exp()  # (2, hidden, states, SEGMENT + 1)
    back, ahead = powers
    weighted = ema.gain[..., None] * powers
    taps = weighted[..., :-1].sum(2)  # (2, hidden, SEGMENT), the kernel k of each direction
    # From a token SEGMENT - 1 before the current one to as many after it; both directions meet in the current token.
    within = toeplitz(torch.cat((taps[0, :, 1:].flip(-1), taps.sum(0)[:, :1], taps[1, :, 1:]), dim=-1))
    to_states = torch.cat((back[..., :-1].flip(-1), ahead[..., :-1]), dim=1)  # (hidden, 2 states, SEGMENT)
    read_out = torch.cat((weighted[0, ..., 1:], weighted[1, ..., 1:].flip(-1)), dim=1)
    columns = _ToSegments.apply(x, documents.slot, documents.source)  # (hidden, SEGMENT, segments)
    out, outgoing = (torch.cat((within, to_states), dim=1) @ columns).split((SEGMENT, to_states.shape[1]), dim=1)
    if documents.longest > 1:
        decay = powers[..., -1].transpose(0, 1).flatten(1)  # (hidden, 2 states)
        out = torch.baddbmm(out, read_out.transpose(1, 2), pass_states(outgoing, decay, documents))
    return _ToTokens.apply(out, documents.slot, documents.source)


class _ToSegments(torch.autograd.Function):
    """From `(tokens, hidden)` to `(hidden, SEGMENT, segments)`; `_ToTokens` is its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor | None, source: Tensor | None) -> Tensor:
        ctx.save_for_backward(slot, source)
        return _to_segments(x, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _to_tokens(grads[0], ctx.saved_tensors[0]), None, None


class _ToTokens(torch.autograd.Function):
    """From `(hidden, SEGMENT, segments)` to `(tokens, hidden)`; `_ToSegments` is its adjoint.

    Its gradient is contiguous, since torch would otherwise multiply matrix by matrix, with a copy of each.
    """

    @staticmethod
    def forward(ctx: Any, columns: Tensor, slot: Tensor | None, source: Tensor | None) -> Tensor:
        ctx.save_for_backward(slot, source)
        return _to_tokens(columns, slot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _to_segments(grads[0], ctx.saved_tensors[1]), None, None


def _to_segments(x: Tensor, source: Tensor | None) -> Tensor:
    if source is not None:  # a row of zeros for the slots without a token
        x = F.pad(x, (0, 0, 0, 1)).index_select(0, source)
    return x.view(len(x) // SEGMENT, SEGMENT, -1).permute(2, 1, 0).contiguous()


def _to_tokens(columns: Tensor, slot: Tensor | None) -> Tensor:
    flat = columns.permute(2, 1, 0).reshape(-1, columns.shape[0])
    return flat if slot is None else flat.index_select(0, slot)
