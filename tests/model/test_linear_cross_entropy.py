"""Cross-entropy by chunks is that of all logits at once."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from modernenc.kernels import cross_entropy
from modernenc.kernels.device import assume_gpu
from modernenc.objectives import linear_cross_entropy as file
from modernenc.objectives.linear_cross_entropy import linear_cross_entropy

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(rows: int, targets: int, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, 16), (50, 16), (50,))
    hidden, weight, bias = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return (hidden, weight, bias), torch.randint(50, (targets,), generator=generator)


def at_once(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor):
    logits = F.linear(hidden, weight, bias)[: len(targets)]
    return F.cross_entropy(logits.to(bias.dtype), targets, reduction="sum"), (logits.argmax(1) == targets).sum()


@pytest.mark.parametrize("rows_of_a_chunk", [7, 1024])
@pytest.mark.parametrize(("rows", "targets"), [(20, 20), (64, 50), (64, 7), (64, 0), (0, 0)])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_loss_correct_predictions_and_gradients_are_those_of_all_logits(rows, targets, rows_of_a_chunk, on_gpu, monkeypatch):
    """Where there are 50 ids, and a GPU multiplies by 56."""
    for name in ("CHUNK_ROWS", "GPU_CHUNK_ROWS"):
        monkeypatch.setattr(file, name, rows_of_a_chunk)
    monkeypatch.setattr(cross_entropy, "HAS_KERNEL", False)
    monkeypatch.setattr(cross_entropy, "CACHE_LOGITS", 200)  # four rows
    tensors, wanted = inputs(rows, targets, torch.float64)
    with assume_gpu() if on_gpu else nullcontext():
        found = linear_cross_entropy(*tensors, wanted)
    expected = at_once(*tensors, wanted)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    assert found[1] == expected[1]
    grads = [torch.autograd.grad(3.0 * loss, tensors) for loss in (found[0], expected[0])]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_under_autocast_products_are_bf16_and_the_loss_is_not():
    tensors, wanted = inputs(64, 60, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = linear_cross_entropy(*tensors, wanted)[0], at_once(*tensors, wanted)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    for one, other in zip(*(torch.autograd.grad(loss, tensors) for loss in (found, expected)), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.01 * other.norm()


def test_extreme_logits_have_a_finite_loss():
    hidden, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0]])
    loss, correct = linear_cross_entropy(hidden, weight, torch.zeros(2), torch.tensor([1]))
    assert loss == 2e4 and correct == 0


def test_a_second_backward_pass_is_refused():
    tensors, wanted = inputs(8, 8, torch.float32)
    loss, _ = linear_cross_entropy(*tensors, wanted)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already"):
        loss.backward()


def test_of_equal_logits_the_first_is_the_prediction_as_in_argmax():
    hidden, weight = torch.ones(3, 1), torch.ones(4, 1)
    _, correct = linear_cross_entropy(hidden, weight, torch.zeros(4), torch.tensor([0, 1, 2]))
    assert correct == 1
