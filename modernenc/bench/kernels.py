"""Parts of a step, as candidates: matrix products, copies, attention with a window, an optimizer, cross-entropy."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from modernenc.backbones import attention, rotary
from modernenc.bench.interleave import Metrics, StepWork, Turn, device, time_candidate
from modernenc.config import Run
from modernenc.model import optim
from modernenc.model.build import build_objectives
from modernenc.objectives import linear_cross_entropy as loss_module

Attention = Callable[[Tensor, rotary.Rotation, attention.VarlenInfo, int | None], Tensor]


def matrix_products(size: int, products: int = 1) -> Turn:
    """Prepare a turn of products of large square matrices in bf16: the hardware's peak."""
    a, b = torch.randn(2, size, size, device=device()).bfloat16()

    def turn(number: int) -> StepWork:
        for _ in range(products):
            torch.mm(a, b)
        return StepWork(0, products * 2.0 * size**3)

    return turn


def copies(size: int) -> Turn:
    """Prepare a turn that copies a large square matrix of fp32: the memory's bandwidth."""
    a, b = torch.randn(2, size, size, device=device())

    def turn(number: int) -> StepWork:
        b.copy_(a)
        return StepWork(0, 0.0)

    return turn


def window_attention(backend: str, run: Run, length: int, backward: bool) -> Turn:
    """Prepare a turn of attention with a window, rotary embedding included, over a micro-batch of documents of one length.

    `backend` is one of `attention.BACKENDS`, FA3 or flex.
    """
    if backend == "FA3":
        activate_flash_attention_impl("FA3")
    heads, window = run.backbone["num_attention_heads"], run.backbone["local_attention"] // 2
    head_dim = run.backbone["hidden_size"] // heads
    tokens = max(length, run.trainer.micro_batch_tokens // length * length)
    ends = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    positions = rotary.positions_of(ends.to(device()), tokens)
    rotation = rotary.rotation(run.backbone["local_rope_theta"], head_dim, positions, length)
    layout = attention.VarlenInfo(ends, length, tokens, device())
    qkv = torch.randn(tokens, 3, heads, head_dim, device=device()).bfloat16().requires_grad_()
    kernels = {**attention.BACKENDS, "FA3": attention.varlen}
    attend = build_flex_attention(layout, window) if backend == "flex" else kernels[backend]
    grad = torch.ones_like(qkv[:, 0])

    def turn(number: int) -> StepWork:
        out = attend(qkv, rotation, layout, window)
        if backward:
            out.backward(grad)
            qkv.grad = None
        return StepWork(tokens, 0.0)

    return turn


def time_window(backend: str, run: Run, length: int, repetitions: int) -> Metrics:
    """Time attention with a window forward alone, and forward and backward together."""
    forward, both = (
        time_candidate(partial(window_attention, backend, run, length, backward), repetitions, calls=10)
        for backward in (False, True)
    )
    return {**both, "forward_ms": forward["ms"]}


def build_flex_attention(layout: attention.VarlenInfo, window: int) -> Attention:
    """Return FlexAttention with a window, compiled on a GPU; the empty blocks of the mask are found once, here."""
    lengths = layout.cu_seqlens.diff()
    documents = torch.repeat_interleave(torch.arange(len(lengths), device=device()), lengths, output_size=layout.tokens)

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents[query] == documents[key]) & ((query - key).abs() <= window)

    make_mask, attend = create_block_mask, flex_attention
    if device().type == "cuda":
        make_mask, attend = torch.compile(make_mask), torch.compile(attend)
    mask = make_mask(is_visible, None, None, layout.tokens, layout.tokens, device())

    def attention_of(qkv: Tensor, rotation: rotary.Rotation, layout: attention.VarlenInfo, window: int | None) -> Tensor:
        q, k = rotary.rotate(qkv[:, 0], rotation), rotary.rotate(qkv[:, 1], rotation)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, qkv[:, 2]))
        return attend(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return attention_of


def optimizer_update(run: Run) -> Turn:
    """Prepare a turn that is a step of the run's optimizer alone, with the same random gradients each time."""
    objectives = build_objectives(run).to(device())
    optimizers = optim.build(objectives, run.optim)
    grads = [(parameter, torch.randn_like(parameter)) for parameter in objectives.parameters()]

    def turn(number: int) -> StepWork:
        for parameter, grad in grads:
            parameter.grad = grad.clone()  # Muon overwrites it
        optim.step(optimizers)
        return StepWork(0, 0.0)

    return turn


def cross_entropy(run: Run, chunk_rows: int = 0, peer: str = "") -> Turn:
    """Prepare a turn of cross-entropy and its gradients over a micro-batch's predicted tokens.

    It is ours, `chunk_rows` at a time, or that of a `peer`: liger (liger-kernel) or cce (cut-cross-entropy, which has no bias).
    """
    if chunk_rows:
        loss_module.CHUNK_ROWS = loss_module.GPU_CHUNK_ROWS = chunk_rows
    hidden_size, vocab_size = run.backbone["hidden_size"], run.backbone["vocab_size"]
    targets = int(run.trainer.micro_batch_tokens * run.phases["decay"].mask_ratio)
    hidden = torch.randn(targets, hidden_size, device=device()).bfloat16().requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, device=device()).mul_(0.02).requires_grad_()
    bias = torch.zeros(vocab_size, device=device()).requires_grad_()
    wanted = torch.randint(vocab_size, (targets,), device=device())

    def loss() -> Tensor:
        if peer == "liger":
            liger = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
            return liger(hidden, weight.bfloat16(), wanted, bias.bfloat16(), reduction="sum")
        if peer == "cce":
            return import_module("cut_cross_entropy").linear_cross_entropy(hidden, weight.bfloat16(), wanted, reduction="sum")
        with torch.autocast(device().type, torch.bfloat16):
            return loss_module.linear_cross_entropy(hidden, weight, bias, wanted)[0]

    def turn(number: int) -> StepWork:
        loss().backward()
        hidden.grad = weight.grad = bias.grad = None
        return StepWork(targets, 6.0 * targets * hidden_size * vocab_size)

    return turn
