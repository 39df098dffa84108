"""Every attention backend equals plain softmax attention on each document alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modernenc.backbones import attention
from modernenc.backbones.attention import BACKENDS, select_backend
from modernenc.kernels import tiled_attention
from support.attention import gradient, inputs, plain


@pytest.mark.parametrize("scores", [1, 300_000, tiled_attention.SCORES_PER_THREAD])
@pytest.mark.parametrize("window", [None, 1, 16, 64, 1000])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_equal_plain_attention_forward_and_backward(causal, window, scores, monkeypatch):
    # Some heads of one tile and 64 queries at a time; several; all.
    monkeypatch.setattr(tiled_attention, "SCORES_PER_THREAD", scores)
    qkv, turn, layout = inputs(torch.float64, causal=causal)
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
    assert largest <= max(1 << 20, 8192 * 192)  # the scores at a time, or the bias of windows: tokens x keys of a tile


def test_the_backend_is_chosen_by_device_and_precision():
    assert select_backend(torch.device("cpu"), torch.bfloat16, 64) == "tiled"
    assert select_backend(torch.device("cuda"), torch.float32, 64) == "tiled"
    assert select_backend(torch.device("cuda"), torch.bfloat16, 64) in ("flash", "varlen")


def test_flash_attention_3_in_torch_comes_before_flash_attn_2(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(attention, "_HAS_FLASH", True)
    assert attention.describe_backends(gpu, torch.bfloat16) == "attention backend flash"
    attention.use_flash_attention_3(torch.device("cpu"))
    assert attention.describe_backends(gpu, torch.bfloat16) == "attention backend flash"
    monkeypatch.setattr(attention, "_flash_3_active", True)
    assert attention.describe_backends(gpu, torch.bfloat16) == "attention backend varlen (FlashAttention 3)"


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 16, 64])
@pytest.mark.parametrize("backend", ["flash", "varlen", "tiled"])
def test_kernels_equal_plain_attention_on_cuda(backend, window, causal):
    if backend == "flash":
        pytest.importorskip("flash_attn")
    qkv, turn, layout = inputs(torch.bfloat16, "cuda", causal=causal)
    exact = qkv.detach().double().requires_grad_()
    ours, expected = BACKENDS[backend](qkv, turn, layout, window), plain(exact, turn, layout, window)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(gradient(ours, qkv).double(), gradient(expected, exact), rtol=5e-2, atol=5e-2)
