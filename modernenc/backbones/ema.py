"""Multi-dimensional damped EMA in both directions, restarted at each document: Ma et al. 2022, arXiv:2209.10655, section 3.1.

Every channel x of the input drives some scalar states h, in the paper's symbols

    h[t] = alpha beta x[t] + (1 - alpha delta) h[t-1],    y[t] = eta . h[t],

with alpha and delta in (0, 1): how much of the input enters, and how much of the past is forgotten. Nothing depends on the
input but through this sum, so y is a convolution of x with the kernel k[l] = sum over states of gain q^l, where
q = 1 - alpha delta and gain = alpha beta eta. An encoder runs it in both directions and adds the two.

`scan` computes it in fp32, at a cost that is linear in length: by matrix products inside segments of 64 tokens, and by states
that pass from segment to segment.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernenc.backbones.initial import normal_
from modernenc.kernels.documents import SEGMENT, Documents
from modernenc.kernels.state_passing import pass_states
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
            ema = scan(x, self.coefficients(x.dtype), documents)
            return F.silu(ema + x * self.residual_weight.to(x.dtype))

    def coefficients(self, dtype: torch.dtype) -> EMACoefficients:
        """Compute decays and gains; eta is scaled by 1/sqrt(states), as the published code does."""
        alpha = self.damping_factor.squeeze(-1).to(dtype).sigmoid()
        # The clamp keeps q above 0, whose logarithm would be -inf, and log1p keeps the bits of a q next to 1, which is what
        # long memories are made of: log(1 - alpha delta) is off by 1e-3 after 16,384 tokens.
        forgotten = (alpha * self.decay_factor.squeeze(-1).to(dtype).sigmoid()).clamp(max=1 - 1e-7)
        log_decay = torch.log1p(-forgotten)
        gain = alpha * self.ema_expansion_matrix.squeeze(-1).to(dtype) * self.kernel_projection_matrix.to(dtype)
        return EMACoefficients(log_decay.unflatten(0, (2, -1)), (gain / math.sqrt(gain.shape[-1])).unflatten(0, (2, -1)))


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
    taps = torch.einsum("dhs,dhst->dht", ema.gain, powers[..., :SEGMENT])  # the kernel k of each direction
    # By distance from 1 - SEGMENT to SEGMENT - 1; both directions meet in the current token.
    both = torch.cat((taps[1, :, 1:].flip(-1), taps.sum(0)[:, :1], taps[0, :, 1:]), dim=-1)
    toeplitz = both.unfold(-1, SEGMENT, 1).flip(-1)  # (hidden, SEGMENT, SEGMENT)
    gain = ema.gain[..., None]
    to_states = torch.cat((back[..., :-1].flip(-1), ahead[..., :-1]), dim=1)  # (hidden, 2 states, SEGMENT)
    read_out = torch.cat((gain[0] * back[..., 1:], gain[1] * ahead[..., 1:].flip(-1)), dim=1)
    columns = _to_segments(x, documents).permute(2, 1, 0).contiguous()  # (hidden, SEGMENT, segments)
    out, outgoing = (torch.cat((toeplitz, to_states), dim=1) @ columns).split((SEGMENT, to_states.shape[1]), dim=1)
    if documents.longest > 1:
        decay = powers[..., -1].transpose(0, 1).flatten(1)  # (hidden, 2 states)
        out = torch.baddbmm(out, read_out.transpose(1, 2), pass_states(outgoing, decay, documents))
    if out.requires_grad:
        # A gradient that is not contiguous would make torch multiply matrix by matrix, with a copy of each.
        out.register_hook(Tensor.contiguous)
    flat = out.permute(2, 1, 0).reshape(-1, x.shape[1])
    return flat if documents.slot is None else flat.index_select(0, documents.slot)


def _to_segments(x: Tensor, documents: Documents) -> Tensor:
    if documents.slot is not None:
        x = x.new_zeros(documents.segments * SEGMENT, x.shape[1]).index_copy(0, documents.slot, x)
    return x.view(documents.segments, SEGMENT, x.shape[1])
