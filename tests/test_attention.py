"""Every attention path equals plain softmax attention on each document alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modernenc.backbones.attention import BACKENDS, VarlenInfo, select_backend
from modernenc.backbones.rotary import Rotation, positions_of, rotate, rotation
from modernenc.kernels import tiled_attention

LENGTHS = [1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 200, 511, 513, 600]


def inputs(dtype=torch.float32, device="cpu", lengths=LENGTHS, heads=5):
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    qkv = torch.randn(total, 3, heads, 32, generator=generator).to(device, dtype).requires_grad_()
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    turn = rotation(10_000, 32, positions_of(ends, total), max(lengths))
    return qkv, turn, VarlenInfo(ends, max(lengths), total, qkv.device)


def plain(qkv: torch.Tensor, turn: Rotation, layout: VarlenInfo, window: int | None) -> torch.Tensor:
    """Softmax attention, one document at a time, in the precision of the input."""
    outs = []
    for start, end in zip(layout.cu_seqlens[:-1].tolist(), layout.cu_seqlens[1:].tolist(), strict=True):
        here = Rotation(turn.cos[start:end], turn.sin[start:end])
        q, k, v = qkv[start:end].unbind(1)
        q, k, v = (x.transpose(0, 1) for x in (rotate(q, here), rotate(k, here), v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        place = torch.arange(end - start, device=q.device)
        if window is not None:
            scores = scores.masked_fill((place[:, None] - place).abs() > window, float("-inf"))
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs)


def gradient(out: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return torch.autograd.grad((out * weight).sum(), qkv)[0]


@pytest.mark.parametrize("scores", [1, 300_000, tiled_attention.SCORES_PER_THREAD])
@pytest.mark.parametrize("window", [None, 1, 16, 64, 1000])
def test_blocks_equal_plain_attention_forward_and_backward(window, scores, monkeypatch):
    # Some heads of one tile and 64 queries at a time; several; all.
    monkeypatch.setattr(tiled_attention, "SCORES_PER_THREAD", scores)
    qkv, turn, layout = inputs(torch.float64)
    ours, expected = BACKENDS["tiled"](qkv, turn, layout, window), plain(qkv, turn, layout, window)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient(ours, qkv), gradient(expected, qkv), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 64])
def test_nothing_costs_length_by_length_memory(window, monkeypatch):
    monkeypatch.setattr(tiled_attention, "SCORES_PER_THREAD", (1 << 20) // torch.get_num_threads())
    qkv, turn, layout = inputs(lengths=[8192], heads=2)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        gradient(BACKENDS["tiled"](qkv, turn, layout, window), qkv)
    assert largest <= max(1 << 20, 8192 * 192)  # the scores at a time, or the bias of windows: tokens x keys of a block


def test_the_path_is_chosen_by_device_and_precision():
    assert select_backend(torch.device("cpu"), torch.bfloat16) == "tiled"
    assert select_backend(torch.device("cuda"), torch.float32) == "tiled"
    assert select_backend(torch.device("cuda"), torch.bfloat16) in ("flash", "varlen")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 16, 64])
@pytest.mark.parametrize("path", ["flash", "varlen", "tiled"])
def test_kernels_equal_plain_attention_on_cuda(path, window):
    if path == "flash":
        pytest.importorskip("flash_attn")
    qkv, turn, layout = inputs(torch.bfloat16, "cuda")
    exact = qkv.detach().double().requires_grad_()
    ours, expected = BACKENDS[path](qkv, turn, layout, window), plain(exact, turn, layout, window)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(gradient(ours, qkv).double(), gradient(expected, exact), rtol=5e-2, atol=5e-2)
