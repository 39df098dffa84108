"""The kernel for windows is softmax attention: compiled where there is a GPU, in Triton's interpreter where there is none."""

import json
import subprocess
import sys

import pytest
import torch

from modernenc.backbones import attention
from modernenc.backbones.attention import VarlenInfo
from modernenc.backbones.rotary import Rotation, positions_of, rotation
from modernenc.kernels.device import assume_gpu
from support.attention import LENGTHS, gradient, plain
from support.commands import importing

attend = pytest.importorskip("modernenc.kernels.window_attention_triton").window_attention
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
HALF = torch.bfloat16 if ON_GPU else torch.float16  # the interpreter multiplies bf16 as if it were integers
EXACT = torch.bfloat16 if ON_GPU else torch.float32  # in fp32, which GPUs take another way for, compilation lasts minutes
TILE = 64


def packed(lengths: list[int], heads: int = 1, head_dim: int = 32, dtype: torch.dtype = EXACT):
    generator, tokens = torch.Generator().manual_seed(0), sum(lengths)
    qkv = torch.randn(tokens, 3, heads, head_dim, generator=generator).to(DEVICE, dtype).requires_grad_()
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    layout = VarlenInfo(ends, max(lengths), tokens, qkv.device)
    return qkv, rotation(10_000, head_dim, positions_of(layout.cu_seqlens, tokens), max(lengths)), layout


def check_equal(ours: torch.Tensor, expected: torch.Tensor, of: torch.Tensor, exact: torch.Tensor) -> None:
    """Compare outputs and gradients, by the precision of the kernel's input."""
    coarse = of.dtype != torch.float32
    for one, other, limit in (
        (ours, expected, 2e-2 if coarse else 1e-5),
        (gradient(ours, of), gradient(expected, exact), 5e-2 if coarse else 1e-5),
    ):
        assert one.dtype == of.dtype
        torch.testing.assert_close(one.double(), other, rtol=limit, atol=limit)


@pytest.mark.parametrize(
    ("window", "lengths", "heads", "head_dim"),
    [
        (1, [1, 2, 3, 1, 60], 2, 32),
        (16, [1, 15, 16, 17, TILE - 1, 1], 3, 32),
        (16, [2 * TILE], 1, 34),
        (64, [1, 63, 64, 65, 2 * TILE + 3], 2, 64),
        (64, [TILE + 1, 200], 1, 80),
        (200, [150, 3], 1, 32),
    ],
)
def test_it_equals_plain_attention_forward_and_backward(window, lengths, heads, head_dim):
    qkv, turn, layout = packed(lengths, heads, head_dim)
    exact = qkv.detach().double().requires_grad_()
    ours = attend(qkv, *turn, layout.documents, window, window)[0]
    check_equal(ours, plain(exact, turn, layout, window), qkv, exact)


@pytest.mark.parametrize(("left", "right"), [(16, 0), (0, 5), (70, 3)])
def test_the_reach_to_both_sides_may_differ(left, right):
    qkv, turn, layout = packed([1, 100, 40])
    exact = qkv.detach().double().requires_grad_()
    ours = attend(qkv, *turn, layout.documents, left, right)[0]
    check_equal(ours, plain(exact, turn, layout, (left, right)), qkv, exact)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_half_precision_differs_by_rounding_only(head_dim):
    qkv, turn, layout = packed([5, 64, 31], 2, head_dim, HALF)
    exact = qkv.detach().double().requires_grad_()
    check_equal(attend(qkv, *turn, layout.documents, 16, 16)[0], plain(exact, turn, layout, 16), qkv, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 16, 64])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_many_documents_and_heads_on_a_gpu(window, head_dim):
    qkv, turn, layout = packed(LENGTHS, 12, head_dim)
    exact = qkv.detach().double().requires_grad_()
    check_equal(attend(qkv, *turn, layout.documents, window, window)[0], plain(exact, turn, layout, window), qkv, exact)


def test_queries_keys_and_values_need_not_be_contiguous_nor_gradients():
    qkv, turn, layout = packed([30, 50], 2)
    expected = attend(qkv, *turn, layout.documents, 8, 8)[0]
    wide = torch.cat([qkv, qkv], -1)[..., :32].transpose(1, 2).contiguous().transpose(1, 2)
    ours = attend(wide, *turn, layout.documents, 8, 8)[0]
    assert not wide.is_contiguous() and torch.equal(ours, expected)
    for one, other in zip(*(torch.autograd.grad(out.sum(), qkv) for out in (ours, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_no_gradient_passes_from_one_document_to_another():
    qkv, turn, layout = packed([40, 30, 50])
    out = attend(qkv, *turn, layout.documents, 16, 16)[0]
    (grad,) = torch.autograd.grad(out[40:70].square().sum(), qkv)
    assert not grad[:40].any() and not grad[70:].any() and grad[40:70].any(-1).all()


def test_the_same_inputs_give_the_same_bits():
    qkv, turn, layout = packed([100, 30], 2, 32, HALF)
    results = []
    for _ in range(2):
        out = attend(qkv, *turn, layout.documents, 16, 16)[0]
        results.append((out.detach(), gradient(out, qkv)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_setting_chooses_it_for_windows_on_a_gpu_in_half_precision(monkeypatch):
    monkeypatch.setattr(attention, "_window_kernel_on", False)
    cpu, gpu, half, single = torch.device("cpu"), torch.device("cuda"), torch.bfloat16, torch.float32
    others = attention.describe_backends(gpu, half)
    assert attention.select_backend(gpu, half, 64) != "window"
    attention.use_window_kernel(True)
    assert attention.select_backend(gpu, half, 64) == "window"
    assert attention.select_backend(gpu, half, None) in ("flash", "varlen")
    assert attention.select_backend(gpu, single, 64) == attention.select_backend(cpu, half, 64) == "tiled"
    assert attention.describe_backends(gpu, half) == f"{others}, window kernel for local layers"
    assert attention.describe_backends(cpu, half) == "attention backend tiled"


def compiled_distance() -> float:
    """The largest distance between compiled attention by the kernel and plain attention, of outputs and gradients."""
    attention.use_window_kernel(True)

    def in_a_layer(qkv: torch.Tensor, turn: Rotation, layout: VarlenInfo) -> torch.Tensor:
        return attention.attention(qkv * 1, turn, layout, 16) * 1

    fast = torch.compile(in_a_layer, backend="inductor" if ON_GPU else "aot_eager", dynamic=True, fullgraph=True)
    distances = []
    for lengths in ([60, 4], [1, 30, 41]):
        qkv, turn, layout = packed(lengths, 1, 32, HALF)
        exact = qkv.detach().double().requires_grad_()
        with assume_gpu():
            ours = fast(qkv, turn, layout)
        expected = plain(exact, turn, layout, 16)
        pairs = (ours, expected), (gradient(ours, qkv), gradient(expected, exact))
        distances += [float((one.double() - other).norm() / other.norm()) for one, other in pairs]
    return max(distances)


def test_it_is_one_call_in_a_compiled_graph():
    command = [sys.executable, __file__]  # the compiler cannot look through checks of types
    found = subprocess.run(command, env=importing(), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) < 1e-2


if __name__ == "__main__":
    print(json.dumps(compiled_distance()))
