"""The EMA's recurrence between segments: `incoming[b] = outgoing[b-1] + decay * incoming[b-1]`, in both directions.

`modernenc.backbones.ema` reduces every segment of 64 tokens to the states that leave it. What remains is a recurrence over
segments, which is sequential as written. Two ways compute it in parallel:

- Doubling rounds (Hillis and Steele 1986): after round r every segment has summed over the 2^r segments before it. This needs
  log2(segments) rounds and nothing but torch, but each round reads and writes all states.
- A Triton kernel on a GPU, `state_passing_triton`, which reads and writes each state once.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from modernenc.kernels.device import use_gpu_kernels
from modernenc.kernels.documents import Documents
from modernenc.shapes import Float

HAS_KERNEL = bool(find_spec("triton") and find_spec(f"{__package__}.state_passing_triton"))
"""Whether the kernel is there. An exported model does not carry it, and does without."""


def pass_states(
    outgoing: Float[Tensor, "hidden states_2 segments"], decay: Float[Tensor, "hidden states_2"], documents: Documents
) -> Float[Tensor, "hidden states_2 segments"]:
    """Return the states that enter each segment, given those that leave its neighbours.

    The first half of the states runs forward, the second half backward. `decay` is the decay over a whole segment. No state
    passes from one document into another.
    """
    incoming = StatePassing.apply(outgoing, decay, documents)
    assert isinstance(incoming, Tensor)
    return incoming


class StatePassing(torch.autograd.Function):
    """`pass_states`; its adjoint is the same recurrence in the opposite direction."""

    @staticmethod
    def forward(ctx: Any, outgoing: Tensor, decay: Tensor, documents: Documents) -> Tensor:
        incoming = run(outgoing, decay, documents, first_forward=True)
        ctx.save_for_backward(incoming, decay)
        ctx.documents = documents
        return incoming

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        incoming, decay = ctx.saved_tensors
        grad = run(grads[0], decay, ctx.documents, first_forward=False)
        return grad, (grad * incoming).sum(-1), None


def run(outgoing: Tensor, decay: Tensor, documents: Documents, first_forward: bool) -> Tensor:
    """Run the first half of the states forward and the second backward, or the other way round unless `first_forward`."""
    if use_gpu_kernels(outgoing.device) and outgoing.dtype == torch.float32 and HAS_KERNEL:
        # Torch's compiler traces this form of import; it is here because Triton takes a while to import, and is not everywhere.
        from . import state_passing_triton

        return state_passing_triton.run(outgoing, decay, documents.may_reach(1), first_forward)
    out, half = torch.zeros_like(outgoing), outgoing.shape[1] // 2
    for states, forward in ((slice(half), first_forward), (slice(half, None), not first_forward)):
        _double(outgoing[:, states], decay[:, states], documents, out[:, states], forward)
    return out


def _double(outgoing: Tensor, decay: Tensor, documents: Documents, out: Tensor, forward: bool) -> None:
    """Fill `out[b] = outgoing[b-1] + decay * out[b-1]` within each document, or with b+1 for b-1 unless `forward`."""
    total, step = outgoing.clone(), 1
    while step < documents.longest:
        source, target = (total[..., :-step], total[..., step:]) if forward else (total[..., step:], total[..., :-step])
        target += (source * decay[..., None]).mul_(documents.may_reach(step))
        decay, step = decay.square(), 2 * step
    source, target = (total[..., :-1], out[..., 1:]) if forward else (total[..., 1:], out[..., :-1])
    torch.mul(source, documents.may_reach(1), out=target)
