"""Triton kernels do what torch does: compiled where there is a GPU, in Triton's interpreter where there is none."""

from contextlib import ExitStack
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from modernenc import kernels
from modernenc.backbones import ema, rotary
from modernenc.kernels import cross_entropy_triton, documents, geglu, rotation, state_passing, state_passing_triton
from modernenc.kernels.device import assume_gpu
from modernenc.kernels.toeplitz import toeplitz

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = [1, 64 * 70 + 3, 63, 64, 65, 64 * 140]


OPERATORS = [
    state_passing_triton.run, geglu.fused_geglu, geglu.fused_geglu_backward, rotation.rotate_fused,
    rotation.rotate_fused_backward,
]  # fmt: skip


@pytest.fixture(autouse=True)
def operators_are_the_kernels():
    """Whatever stands in for them on a CPU, since another test registered it."""
    with ExitStack() as stack:
        for operator in OPERATORS:
            stack.enter_context(operator.set_kernel_enabled("cpu", enabled=False))
        yield


@pytest.mark.parametrize("first_forward", [True, False])
def test_states_pass_within_documents_only(first_forward):
    layout = documents.Documents(LENGTHS, DEVICE)
    torch.manual_seed(0)
    segments, order = len(layout.number), range(len(layout.number))
    # Not a whole number of tiles of states.
    outgoing, decay = torch.randn(3, 10, segments, device=DEVICE), torch.rand(3, 10, device=DEVICE)
    same, expected = layout.may_reach(1), torch.zeros(3, 10, segments, dtype=torch.double, device=DEVICE)
    for half, forward in ((slice(5), first_forward), (slice(5, 10), not first_forward)):
        for before, segment in pairwise(order if forward else reversed(order)):  # the definition, segment by segment
            if same[min(before, segment)]:
                decayed = decay[:, half].double() * expected[:, half, before]
                expected[:, half, segment] = outgoing[:, half, before].double() + decayed
    got = state_passing_triton.run(outgoing, decay, same, first_forward)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_an_ema_and_its_gradients_are_the_same_with_the_kernel(monkeypatch):
    calls = []

    def run_and_count(*arguments):
        calls.append(arguments)
        return state_passing_triton.run(*arguments)

    monkeypatch.setattr(kernels, "state_passing_triton", SimpleNamespace(run=run_and_count), raising=False)
    results = []
    for has_kernel in (True, False):
        monkeypatch.setattr(state_passing, "HAS_KERNEL", has_kernel)
        torch.manual_seed(0)
        module = ema.MultiDimensionDampedEMA(4, 6).to(DEVICE)
        x = torch.randn(sum(LENGTHS), 4).to(DEVICE).requires_grad_()
        with assume_gpu():
            out = module(x, documents.Documents(LENGTHS, DEVICE))
            out.square().sum().backward()
        assert len(calls) == 2  # forward and backward, with the kernel alone
        results.append([out.detach(), *(leaf.grad for leaf in (x, *module.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_toeplitz_matrices_have_equal_numbers_along_diagonals(n):
    diagonals = torch.randn(3, 2 * n - 1, dtype=torch.double, device=DEVICE).requires_grad_()
    made = toeplitz(diagonals)
    assert made.shape == (3, n, n)
    assert all(torch.equal(made[:, i, j], diagonals[:, n - 1 + j - i]) for i in range(n) for j in range(n))
    assert torch.autograd.gradcheck(toeplitz, diagonals)


@pytest.mark.parametrize("vocab", [5, 4096, 10_007])
def test_losses_predictions_and_gradients_of_logits_are_those_of_cross_entropy(vocab):
    torch.manual_seed(0)
    logits = (10 * torch.randn(7, vocab)).to(DEVICE)
    logits[3] = 0  # all are equal: the first is the prediction
    targets = torch.randint(vocab, (7,)).to(DEVICE)
    wanted = logits.double().requires_grad_()
    expected = F.cross_entropy(wanted, targets, reduction="none")
    expected.sum().backward()
    first = logits.argmax(1)
    losses, best = cross_entropy_triton.to_gradients(logits, targets)
    torch.testing.assert_close(losses, expected.float(), rtol=1e-5, atol=1e-5)
    assert best.tolist() == first.tolist() and best[3] == 0
    assert wanted.grad is not None
    torch.testing.assert_close(logits, wanted.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [1, 64, 1152])
def test_geglu_and_its_gradient_are_those_of_torch(width):
    """In rows that are no whole number of tiles, and where there are none."""
    for tokens in (0, 1, 37):
        torch.manual_seed(0)
        x = (3 * torch.randn(tokens, 2 * width)).to(DEVICE).requires_grad_()
        wide = x.detach().double().requires_grad_()
        value, gate = wide.chunk(2, dim=-1)
        expected = F.gelu(value) * gate
        with assume_gpu():
            out = geglu.geglu(x)
        weight = torch.randn(tokens, width).to(DEVICE)
        (out * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
        assert x.grad is not None and wide.grad is not None
        torch.testing.assert_close(x.grad, wide.grad.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [2, 64, 80])
def test_queries_and_keys_are_rotated_and_values_are_not(head_dim):
    """And so are gradients, by the opposite angle; also where there are no tokens, or no whole number of tiles."""
    for tokens in (0, 1, 70):
        torch.manual_seed(0)
        qkv = torch.randn(tokens, 3, 2, head_dim).to(DEVICE).requires_grad_()
        turn = rotary.rotation(1e4, head_dim, torch.arange(tokens, device=DEVICE) % 50, 50)
        found = rotation.rotate_fused(qkv, turn.cos, turn.sin)
        expected = [rotary.rotate(qkv[:, 0], turn), rotary.rotate(qkv[:, 1], turn), qkv[:, 2]]
        weights = [torch.randn_like(part) for part in found]
        gradients = [
            torch.autograd.grad((torch.stack(list(parts)) * torch.stack(weights)).sum(), qkv)[0] for parts in (found, expected)
        ]
        for one, other in zip([*found, gradients[0]], [*expected, gradients[1]], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
