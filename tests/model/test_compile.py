"""What is compiled on a GPU is one graph for all documents, and computes the same: on the CPU, by a stand-in for the kernel."""

import json
import os
import pwd
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import varlen

from modernenc.backbones import attention
from modernenc.backbones.attention import BACKENDS
from modernenc.backbones.rotary import Rotation, rotate
from modernenc.config import CONF_DIR
from modernenc.kernels import state_passing_triton
from modernenc.kernels.device import assume_gpu
from modernenc.kernels.geglu import fused_geglu, fused_geglu_backward
from modernenc.kernels.rotation import rotate_fused, rotate_fused_backward
from modernenc.model.build import (
    CACHE_VARIABLE,
    checkpoint_activations,
    compile_layers,
    compiles,
    keep_compiled_code,
    masked_lm_with,
)
from support.attention import gradient, inputs, plain
from support.commands import importing
from support.runs import composed

BATCHES = [[320], [128, 100, 28, 64], [20, 300], [64] * 6, [31, 33, 256], [5] * 90]
"""The first has as many tokens as its document, which means nothing."""


def shares(q, k, ends, window):
    documents = torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff().long(), output_size=len(q))
    places = torch.arange(len(q))
    seen = documents[:, None] == documents
    if window is not None and window[0] >= 0:
        seen &= (places[:, None] - places).abs() <= window[0]
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


calls: list[int] = []
"""The queries of each forward call of the stand-in."""


@varlen._varlen_attn.register_kernel("cpu")
@torch.autocast("cpu", enabled=False)
def _(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *rest):
    calls.append(len(query))
    out = torch.einsum("hqk,khd->qhd", shares(query, key, cu_seq_q, window_size), value.float())
    return torch.empty_like(query).copy_(out), torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
@torch.autocast("cpu", enabled=False)
def _(grad, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, state, scale=None, window_size=None):
    q, k, v, grad = (x.float() for x in (query, key, value, grad))
    p = shares(q, k, cu_seq_q, window_size)
    dp = torch.einsum("qhd,khd->hqk", grad, v)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    dq, dk, dv = (torch.einsum(how, *of) for how, of in (
        ("hqk,khd->qhd", (ds, k)), ("hqk,qhd->khd", (ds, q)), ("hqk,qhd->khd", (p, grad)))
    )  # fmt: skip
    return tuple(torch.empty_like(x).copy_(made) for x, made in zip((query, key, value), (dq, dk, dv), strict=True))


@rotate_fused.register_kernel("cpu")
def _(qkv, cos, sin):
    q, k, v = qkv.unbind(1)
    return rotate(q, Rotation(cos, sin)), rotate(k, Rotation(cos, sin)), v.clone()


@rotate_fused_backward.register_kernel("cpu")
def _(q, k, v, cos, sin):
    return torch.stack((rotate(q, Rotation(cos, -sin)), rotate(k, Rotation(cos, -sin)), v), dim=1)


@fused_geglu.register_kernel("cpu")
def _(x):
    value, gate = x.chunk(2, dim=-1)
    return F.gelu(value) * gate


@fused_geglu_backward.register_kernel("cpu")
def _(grad, x):
    value, gate = x.float().chunk(2, dim=-1)
    density = torch.exp(-value.square() / 2) / (2 * torch.pi) ** 0.5
    distribution = (1 + torch.erf(value / 2**0.5)) / 2
    return torch.cat((grad * gate * (distribution + value * density), grad * value * distribution), dim=-1).to(x.dtype)


def pass_states(outgoing, decay, same, first_forward):
    incoming, half = torch.zeros_like(outgoing), outgoing.shape[1] // 2
    for states, forward in ((slice(half), first_forward), (slice(half, None), not first_forward)):
        order = range(outgoing.shape[2])
        for before, after in pairwise(order if forward else reversed(order)):
            total = outgoing[:, states, before] + decay[:, states] * incoming[:, states, before]
            incoming[:, states, after] = total * same[min(before, after)]
    return incoming


@pytest.mark.parametrize("window", [None, 16])
def test_the_call_of_torchs_kernel_is_plain_attention(window):
    qkv, turn, layout = inputs(lengths=[1, 2, 15, 64, 200])
    ours, expected = BACKENDS["varlen"](qkv, turn, layout, window), plain(qkv, turn, layout, window)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(ours, qkv), gradient(expected, qkv), rtol=1e-4, atol=1e-5)


def test_recomputed_layers_keep_what_attention_returned_on_a_gpu(monkeypatch):
    """And compute the same bits."""
    monkeypatch.setattr(attention, "_window_kernel_on", False)  # whatever was trained before in this process
    settings = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(CONF_DIR / "backbone" / "modernbert_tiny.yaml")))
    settings |= {"vocab_size": 300, "num_hidden_layers": 4}
    made = []
    for every in (0, 1):
        torch.manual_seed(0)
        model = masked_lm_with(settings)
        checkpoint_activations(model.backbone, every)
        ids, ends = torch.randint(300, (328,)), torch.tensor([0, 128, 328]).int()
        calls.clear()
        with assume_gpu(), torch.autocast("cpu", torch.bfloat16):
            model.backbone(ids, ends, 200).float().square().sum().backward()
        assert calls == [328] * 4
        made.append([parameter.grad for parameter in cast(nn.Module, model.backbone).parameters()])
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other)


def test_layers_are_compiled_on_a_gpu_in_bf16_and_not_under_strict_determinism():
    made = composed(["+recipe=base"]).trainer
    changes: list[tuple[str, dict[str, Any]]] = [("cpu", {}), ("cuda", {"precision": "32-true"}), ("cuda", {"compile": False})]
    changes += [("cuda", {"determinism": "strict"}), ("cuda", {})]
    assert [compiles(replace(made, **change), torch.device(device)) for device, change in changes] == [False] * 4 + [True]


def test_compiled_code_is_kept_where_only_the_user_writes_or_where_torch_says(tmp_path, monkeypatch):
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as unwritable:
        unwritable.setattr(os, "access", lambda *arguments: False)
        assert keep_compiled_code() == "torch's own cache" and CACHE_VARIABLE not in os.environ
    kept = Path(keep_compiled_code())
    assert kept.is_relative_to(tmp_path) and os.environ[CACHE_VARIABLE] == str(kept) and kept.stat().st_mode & 0o077 == 0
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a user whom the system does not know, as in a container
    assert keep_compiled_code() == "torch's own cache"


def outcomes(model, device) -> list[torch.Tensor]:
    """Hidden states in training and in validation, and gradients, of each batch."""
    generator, made = torch.Generator().manual_seed(0), []
    for lengths in BATCHES:
        tokens = sum(lengths)
        ids = torch.randint(300, (tokens,), generator=generator).to(device)
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        positions = torch.randperm(tokens, generator=generator)[:64].sort().values.to(device)
        with torch.autocast(device, torch.bfloat16):
            model.train()
            hidden = model.backbone(ids, ends, max(lengths), positions)
            weight = torch.randn(hidden.shape, generator=generator).to(device)
            model.zero_grad()
            (hidden.float() * weight).sum().backward()
            model.eval()
            with torch.no_grad():
                made += [hidden.detach(), model.backbone(ids, ends, max(lengths), positions)]
        made += [parameter.grad.clone() for parameter in model.backbone.parameters()]
    return made


def compare(name: str, every: int, device: str) -> tuple[int, float]:
    """Graphs made, and the largest distance of an outcome of compiled parts."""
    given = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "backbone" / f"{name}.yaml"))
    settings = {**cast(dict[str, Any], given), "vocab_size": 300, "num_hidden_layers": 5}
    settings |= {key: 0.0 for key in settings if "dropout" in key}
    if device == "cpu":
        state_passing_triton.run.register_kernel("cpu")(pass_states)  # Triton's interpreter takes minutes
        torch.compile = partial(torch.compile, backend="aot_eager")
    torch.manual_seed(0)
    model = masked_lm_with(settings).to(device)
    with assume_gpu():
        expected = outcomes(model, device)
        checkpoint_activations(model.backbone, every)
        compile_layers(model.backbone)
        ours = outcomes(model, device)
    pairs = zip(ours, expected, strict=True)
    return counters["stats"]["unique_graphs"], max(float((one - other).norm() / other.norm()) for one, other in pairs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("name", "every", "graphs"),
    # ModernBERT's layers: the first, global, local, and the last at some positions; those made again, and those that are not.
    # MEGA's: all but the last, and the last. Each in training and in validation.
    [("modernbert_tiny", 2, 10), ("mega_tiny", 0, 4)],
)
def test_few_graphs_serve_all_documents_and_compute_the_same(name, every, graphs, device):
    command = [sys.executable, __file__, name, str(every), device]  # the compiler cannot look through checks of types
    found = subprocess.run(command, env=importing(), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    made, distance = json.loads(found.stdout)
    assert made == graphs
    assert distance < 2e-2


if __name__ == "__main__":
    print(json.dumps(compare(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
