"""Attention with a window within packed documents: one Triton kernel forward, one backward, with rotary embedding inside.

With a reach of 64 tokens to each side there is little to compute, and what counts is memory. Forward reads queries, keys and
values and writes the result; backward writes all three gradients into one tensor, so that nothing is left to concatenate.

A program owns a tile of tokens of one head. Forward it walks, block by block, over the keys that its queries see. Backward it
walks over them again for the gradients of its queries, then over the queries that see its keys for the gradients of keys and
values. No two programs write to the same place: there are no atomics, and the same inputs give the same bits.

Queries and keys are held as the two halves of their dimensions that the rotation mixes. A product of whole rows is the sum of
the products of their halves, so the halves need not be put together.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Triton's own annotations deny that a tensor can be indexed and that its range can be iterated.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64
"""Tokens of a program's tile. With a reach of 64 to each side its queries see 129 of the 192 keys that are loaded, 67 %; in
tiles of 128 they would see half. Fewer than 64 rows do not fill the matrix units of a Hopper GPU."""
FORWARD = {"BLOCK": 64, "num_warps": 4, "num_stages": 2}
BACKWARD = {"BLOCK": 64, "num_warps": 4, "num_stages": 1}
BACKWARD_FROM_REGISTERS = {**BACKWARD, "BLOCK": 32}
"""Tokens of a block, and options of compilation. Backward a tile's sums and a block's scores with their gradients take 128 of
the 255 registers that a thread can have; where a product takes its operands from registers, there is less room for those."""
LOW = tl.constexpr(-1e30)
"""Score of what is not seen: finite, because infinity would give NaN where a query sees nothing of a block."""
LOG2_E = tl.constexpr(1.4426950408889634)


@torch.library.custom_op("modernenc::window_attention", mutates_args=())
def window_attention(qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, and attend within each document to `left` tokens before and `right` tokens after each one.

    `qkv` is (tokens, 3, heads, head_dim) in half precision or fp32, `cos` and `sin` are (tokens, head_dim/2), `documents` says
    in int32 which document each token belongs to. Returns (tokens, heads, head_dim) and, for the backward pass, the logarithms
    to base 2 of softmax's denominators, (heads, tokens).
    """
    tokens, _, heads, head_dim = qkv.shape
    out, log_sums = _empty_results(qkv)
    kernel: Any = _forward[heads, triton.cdiv(tokens, TILE)]
    inputs = _inputs(qkv, cos, sin, documents)
    kernel(*inputs, out, log_sums, tokens, heads, **constants(head_dim, left, right), **FORWARD)
    return out, log_sums


@torch.library.custom_op("modernenc::window_attention_backward", mutates_args=())
def window_attention_backward(
    grad: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor, out: Tensor, log_sums: Tensor, left: int, right: int
) -> Tensor:
    """Return the gradient of `qkv`, given that of the first result of `window_attention`, and both results."""
    tokens, _, heads, head_dim = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    # Hopper and Blackwell of data centres multiply from shared memory.
    from_registers = qkv.device.type == "cuda" and torch.cuda.get_device_capability(qkv.device)[0] not in (9, 10)
    options = BACKWARD_FROM_REGISTERS if from_registers else BACKWARD
    kernel: Any = _backward[heads, triton.cdiv(tokens, TILE)]
    inputs = _inputs(qkv, cos, sin, documents)
    kernel(*inputs, out, grad.contiguous(), log_sums, dqkv, tokens, heads, **constants(head_dim, left, right), **options)
    return dqkv


@window_attention.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Tell torch the shapes of the results when the operator is traced."""
    return _empty_results(qkv)


@window_attention_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor, out: Tensor, log_sums: Tensor, left: int, right: int
) -> Tensor:
    """Tell torch the shape of the result when the operator is traced."""
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.left, ctx.right = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dqkv = window_attention_backward(grad, *ctx.saved_tensors, ctx.left, ctx.right)
    return dqkv, None, None, None, None, None


window_attention.register_autograd(_differentiate, setup_context=_save)


def constants(head_dim: int, left: int, right: int) -> dict[str, int]:
    """Return what the kernels are compiled for: a head's dimensions, half of them padded, the reach, and the tile."""
    half = max(16, triton.next_power_of_2(head_dim // 2))  # a matrix product takes 16 at least
    return {"HEAD_DIM": head_dim, "HALF": half, "LEFT": left, "RIGHT": right, "TILE": TILE}


def _empty_results(qkv: Tensor) -> tuple[Tensor, Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    return qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(heads, tokens, dtype=torch.float32)


def _inputs(qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor) -> tuple[Any, ...]:
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    return qkv, *qkv.stride()[:3], cos.contiguous(), sin.contiguous(), documents


@triton.jit
def _exists(first, tokens, ROWS: tl.constexpr):
    """Say which of ROWS tokens exist, from the `first` one on, which may be negative."""
    token = first + tl.arange(0, ROWS)
    return (token >= 0) & (token < tokens)


@triton.jit
def _place(stride, first, tokens, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr):
    """Return where rows of COLUMNS numbers lie, and which of them exist: SIZE of each token that exists."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    there = _exists(first, tokens, ROWS)[:, None] & (column < SIZE)[None, :]
    return first.to(tl.int64) * stride + row[:, None] * stride + column[None, :], there


@triton.jit
def _load(x, stride, first, tokens, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """Load rows of all dimensions."""
    place, there = _place(stride, first, tokens, ROWS, 2 * HALF, HEAD_DIM)
    return tl.load(x + place, there, 0.0)


@triton.jit
def _load_rotated(x, stride, cos, sin, first, tokens, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """Load the two halves of queries or keys, rotated in fp32 and rounded to their own precision."""
    place, there = _place(HEAD_DIM // 2, first, tokens, ROWS, HALF, HEAD_DIM // 2)
    c, s = tl.load(cos + place, there, 0.0).to(tl.float32), tl.load(sin + place, there, 0.0).to(tl.float32)
    place, there = _place(stride, first, tokens, ROWS, HALF, HEAD_DIM // 2)
    one, other = tl.load(x + place, there, 0.0), tl.load(x + HEAD_DIM // 2 + place, there, 0.0)
    a, b = one.to(tl.float32), other.to(tl.float32)
    # Without `where` Triton would rotate in the layout of a product's operand, which each warp of an Ampere GPU holds wholly,
    # and run out of registers.
    return tl.where(there, (a * c - b * s).to(one.dtype), 0.0), tl.where(there, (b * c + a * s).to(one.dtype), 0.0)


@triton.jit
def _store_unrotated(
    x, stride, cos, sin, first, tokens, a, b, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Store the gradients of queries or keys, given those of their rotated halves: rotate by the opposite angle."""
    place, there = _place(HEAD_DIM // 2, first, tokens, ROWS, HALF, HEAD_DIM // 2)
    c, s = tl.load(cos + place, there, 0.0).to(tl.float32), tl.load(sin + place, there, 0.0).to(tl.float32)
    place, there = _place(stride, first, tokens, ROWS, HALF, HEAD_DIM // 2)
    tl.store(x + place, a * c + b * s, there)
    tl.store(x + HEAD_DIM // 2 + place, b * c - a * s, there)


@triton.jit
def _seen(
    documents, queries, keys, tokens, LEFT: tl.constexpr, RIGHT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    """Say which keys each query sees; tokens that do not exist see nothing and are not seen."""
    query, key = queries + tl.arange(0, QUERIES), keys + tl.arange(0, KEYS)
    query_document = tl.load(documents + query, _exists(queries, tokens, QUERIES), -1)
    key_document = tl.load(documents + key, _exists(keys, tokens, KEYS), -2)
    distance = key[None, :] - query[:, None]
    return (query_document[:, None] == key_document[None, :]) & (distance >= -LEFT) & (distance <= RIGHT)


@triton.jit
def _products(a, b, others_a, others_b):
    """Return the products of rows given as two halves with other rows."""
    return tl.dot(b, tl.trans(others_b), tl.dot(a, tl.trans(others_a), input_precision="ieee"), input_precision="ieee")


@triton.jit
def _forward(
    qkv, token_stride, part_stride, head_stride, cos, sin, documents, out, log_sums, tokens, heads,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention of one tile's queries."""
    head, start = tl.program_id(0), tl.program_id(1) * TILE  # programs side by side share the angles
    q = qkv + head * head_stride
    k, v = q + part_stride, q + 2 * part_stride
    scale: tl.constexpr = LOG2_E * HEAD_DIM**-0.5
    qa, qb = _load_rotated(q, token_stride, cos, sin, start, tokens, TILE, HEAD_DIM, HALF)
    highest, total = tl.full([TILE], LOW, tl.float32), tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, 2 * HALF], tl.float32)
    for offset in range(-LEFT, TILE + RIGHT, BLOCK):
        first = start + offset
        ka, kb = _load_rotated(k, token_stride, cos, sin, first, tokens, BLOCK, HEAD_DIM, HALF)
        values = _load(v, token_stride, first, tokens, BLOCK, HEAD_DIM, HALF)
        seen = _seen(documents, start, first, tokens, LEFT, RIGHT, TILE, BLOCK)
        scores = tl.where(seen, _products(qa, qb, ka, kb) * scale, LOW)
        higher = tl.maximum(highest, tl.max(scores, 1))
        # What a query adds before it sees a key is multiplied by 0 when it does; it sees its own.
        probs, kept = tl.exp2(scores - higher[:, None]), tl.exp2(highest - higher)
        total = total * kept + tl.sum(probs, 1)
        mixed = tl.dot(probs.to(values.dtype), values, mixed * kept[:, None], input_precision="ieee")
        highest = higher
    place, there = _place(heads * HEAD_DIM, start, tokens, TILE, 2 * HALF, HEAD_DIM)
    tl.store(out + head * HEAD_DIM + place, mixed / total[:, None], there)
    log_sums += head.to(tl.int64) * tokens + start
    tl.store(log_sums + tl.arange(0, TILE), highest + tl.log2(total), _exists(start, tokens, TILE))


@triton.jit
def _backward(
    qkv, token_stride, part_stride, head_stride, cos, sin, documents, out, grad, log_sums, dqkv, tokens, heads,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile's queries, then those of its keys and values.

    With P = softmax(S), S = Q K^T and O = P V, and dX for the gradient of X:
    dP = dO V^T,  dS = P (dP - rowsum(O dO)),  dQ = dS K,  dK = dS^T Q,  dV = P^T dO.
    """
    head, start, width = tl.program_id(0), tl.program_id(1) * TILE, heads * HEAD_DIM
    q = qkv + head * head_stride
    k, v = q + part_stride, q + 2 * part_stride
    out += head * HEAD_DIM
    grad += head * HEAD_DIM
    log_sums += head.to(tl.int64) * tokens
    dq = dqkv + head * HEAD_DIM
    _queries_backward(
        q, k, v, token_stride, cos, sin, documents, out, grad, log_sums, width, dq, start, tokens,
        HEAD_DIM, HALF, LEFT, RIGHT, TILE, BLOCK,
    )  # fmt: skip
    _keys_backward(
        q, k, v, token_stride, cos, sin, documents, out, grad, log_sums, width, dq + width, dq + 2 * width, start, tokens,
        HEAD_DIM, HALF, LEFT, RIGHT, TILE, BLOCK,
    )  # fmt: skip


@triton.jit
def _load_grad(out, grad, log_sums, stride, first, tokens, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """Load the gradients of outputs, their products with the outputs, row by row, and the logarithms of the denominators."""
    grads = _load(grad, stride, first, tokens, ROWS, HEAD_DIM, HALF)
    outs = _load(out, stride, first, tokens, ROWS, HEAD_DIM, HALF)
    log_sum = tl.load(log_sums + first + tl.arange(0, ROWS), _exists(first, tokens, ROWS), 0.0)
    return grads, tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1), log_sum


@triton.jit
def _queries_backward(
    q, k, v, stride, cos, sin, documents, out, grad, log_sums, width, dq, start, tokens,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    scale: tl.constexpr = HEAD_DIM**-0.5
    qa, qb = _load_rotated(q, stride, cos, sin, start, tokens, TILE, HEAD_DIM, HALF)
    grads, delta, log_sum = _load_grad(out, grad, log_sums, width, start, tokens, TILE, HEAD_DIM, HALF)
    da, db = tl.zeros([TILE, HALF], tl.float32), tl.zeros([TILE, HALF], tl.float32)
    for offset in tl.range(-LEFT, TILE + RIGHT, BLOCK, disable_licm=True):  # hoisted addresses would be spilled
        first = start + offset
        ka, kb = _load_rotated(k, stride, cos, sin, first, tokens, BLOCK, HEAD_DIM, HALF)
        values = _load(v, stride, first, tokens, BLOCK, HEAD_DIM, HALF)
        seen = _seen(documents, start, first, tokens, LEFT, RIGHT, TILE, BLOCK)
        probs = tl.where(seen, tl.exp2(_products(qa, qb, ka, kb) * (LOG2_E * scale) - log_sum[:, None]), 0.0)
        dprobs = tl.dot(grads, tl.trans(values), input_precision="ieee")
        dscores = (probs * (dprobs - delta[:, None])).to(grads.dtype)
        da, db = tl.dot(dscores, ka, da, input_precision="ieee"), tl.dot(dscores, kb, db, input_precision="ieee")
    _store_unrotated(dq, 3 * width, cos, sin, start, tokens, da * scale, db * scale, TILE, HEAD_DIM, HALF)


@triton.jit
def _keys_backward(
    q, k, v, stride, cos, sin, documents, out, grad, log_sums, width, dk, dv, start, tokens,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores are transposed here: a row is a key, which queries see from RIGHT before it to LEFT after it."""
    scale: tl.constexpr = HEAD_DIM**-0.5
    ka, kb = _load_rotated(k, stride, cos, sin, start, tokens, TILE, HEAD_DIM, HALF)
    values = _load(v, stride, start, tokens, TILE, HEAD_DIM, HALF)
    da, db = tl.zeros([TILE, HALF], tl.float32), tl.zeros([TILE, HALF], tl.float32)
    dvalues = tl.zeros([TILE, 2 * HALF], tl.float32)
    for offset in tl.range(-RIGHT, TILE + LEFT, BLOCK, disable_licm=True):
        first = start + offset
        qa, qb = _load_rotated(q, stride, cos, sin, first, tokens, BLOCK, HEAD_DIM, HALF)
        grads, delta, log_sum = _load_grad(out, grad, log_sums, width, first, tokens, BLOCK, HEAD_DIM, HALF)
        seen = _seen(documents, start, first, tokens, RIGHT, LEFT, TILE, BLOCK)
        probs = tl.where(seen, tl.exp2(_products(ka, kb, qa, qb) * (LOG2_E * scale) - log_sum[None, :]), 0.0)
        dvalues = tl.dot(probs.to(grads.dtype), grads, dvalues, input_precision="ieee")
        dprobs = tl.dot(values, tl.trans(grads), input_precision="ieee")
        dscores = (probs * (dprobs - delta[None, :])).to(grads.dtype)
        da, db = tl.dot(dscores, qa, da, input_precision="ieee"), tl.dot(dscores, qb, db, input_precision="ieee")
    _store_unrotated(dk, 3 * width, cos, sin, start, tokens, da * scale, db * scale, TILE, HEAD_DIM, HALF)
    place, there = _place(3 * width, start, tokens, TILE, 2 * HALF, HEAD_DIM)
    tl.store(dv + place, dvalues, there)
