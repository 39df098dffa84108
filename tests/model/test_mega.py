"""MEGA equals that of transformers 4, and works where that fails; `test_random_configurations` compares it with the paper.

transformers 5 has no MEGA: what 4.57's gives for the same weights is kept in `mega_logits.safetensors`, which
`PYTHONPATH=tests python tests/model/test_mega.py` wrote under it.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modernenc.backbones import ema
from modernenc.backbones.mega import Mega
from modernenc.hugging_face import converter_of
from modernenc.kernels import state_passing
from modernenc.kernels.device import assume_gpu
from modernenc.objectives.masked_lm import MaskedLM
from support.ema import recurrence
from support.tensors import apart, ids, of_transformers_4

KEPT = Path(__file__).with_name("mega_logits.safetensors")
EVERY = 25
"""Of the logits of a token so many-th are kept."""
CHUNK = 32
SIZES = {
    "vocab_size": 200, "hidden_size": 48, "intermediate_size": 96, "nffn_hidden_size": 80, "num_hidden_layers": 4,
    "shared_representation_size": 24, "ema_projection_size": 8, "chunk_size": CHUNK,
}  # fmt: skip
NO_DROPOUT = {
    "dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "nffn_activation_dropout_prob": 0.0,
}  # fmt: skip
VARIANTS = {
    "published": {},
    "layernorm, laplace": {"normalization_type": "layernorm", "attention_activation": "laplace"},
    "rotary": {"relative_positional_bias": "rotary"},
    "rotary, laplace": {"relative_positional_bias": "rotary", "attention_activation": "laplace"},
}
OPTIONS = {
    "rmsnorm": {"normalization_type": "rmsnorm"},
    "normalised attention": {"normalize_attention": True},
    "two hops": {"two_hop_residual": True},
}
UNSHARDED = [1, 7, CHUNK - 1, CHUNK, 2 * CHUNK, 5 * CHUNK]
"""Lengths that transformers takes."""
OTHER = [CHUNK + 1, 3 * CHUNK + 7, 2 * CHUNK - 1]
"""Lengths at which it crashes."""


def ours(memory: str = "short", **settings) -> Any:
    """A model in which every part matters."""
    torch.manual_seed(0)
    model = MaskedLM(Mega(**{**SIZES, **NO_DROPOUT, **settings}, max_position=512))  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        if "ema_gate" not in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.15)
        elif memory == "long" and ("damping" in name or "decay" in name):
            torch.nn.init.normal_(parameter, -2, 2)
    return model.eval()


def theirs(model: Any) -> Any:
    from transformers import MegaConfig, MegaForMaskedLM  # pyright: ignore[reportAttributeAccessIssue]

    keys = {key: value for key, value in model.backbone.settings.items() if key != "max_position"}
    config = MegaConfig(**keys, max_positions=512, use_chunking=True, tie_word_embeddings=True, add_lm_hidden_dense_layer=True)
    other = MegaForMaskedLM(config)
    other.load_state_dict(converter_of(model.backbone).to_hugging_face(model.state_dict()))
    return other.eval()


@torch.no_grad()
def logits(model: MaskedLM, documents: list[Tensor]) -> list[Tensor]:
    lengths = [len(document) for document in documents]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return list(model.logits(torch.cat(documents), ends, max(lengths), torch.arange(sum(lengths))).split(lengths))


def padded_by_hand(other: Any, document: Tensor) -> Tensor:
    """Logits of transformers' MEGA, which wants whole chunks."""
    padding = -len(document) % CHUNK if len(document) > CHUNK else 0
    row = torch.nn.functional.pad(document, (0, padding), value=1)[None]
    mask = torch.ones_like(row).index_fill(1, torch.arange(len(document), row.shape[1]), 0)
    return other(input_ids=row, attention_mask=mask).logits[0, : len(document)]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_those_that_mega_for_masked_lm_gave(variant):
    given = [part[:, ::EVERY] for part in logits(ours(**VARIANTS[variant]), ids([*UNSHARDED, *OTHER]))]
    worst = apart(given, list(load_file(KEPT)[variant].split([*UNSHARDED, *OTHER])))
    print(f"{variant}: {worst:.1e}")
    assert worst <= 1e-4


@of_transformers_4
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_those_of_mega_for_masked_lm(variant):
    model = ours(**VARIANTS[variant])
    other, documents = theirs(model), ids(UNSHARDED)
    worst = apart(logits(model, documents), [other(input_ids=document[None]).logits[0] for document in documents])
    print(f"{variant}: {worst:.1e}")
    assert worst <= 1e-4


@of_transformers_4
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_where_it_crashes_logits_equal_those_of_rows_padded_by_hand(variant):
    model = ours(**VARIANTS[variant])
    other, documents = theirs(model), ids(OTHER)
    with pytest.raises(RuntimeError, match="shape"):
        other(input_ids=documents[0][None])
    worst = apart(logits(model, documents), [padded_by_hand(other, document) for document in documents])
    print(f"{variant}: {worst:.1e}")
    assert worst <= 1e-4


# "rotary, laplace" is left out: with such weights, one bit more in the embeddings moves its logits by 5e-5.
@pytest.mark.parametrize("variant", ["published", "layernorm, laplace", "rotary", *OPTIONS])
def test_long_memories_equal_the_recurrence_in_double_precision(variant, monkeypatch):
    settings, documents = (VARIANTS | OPTIONS)[variant], ids([*UNSHARDED, *OTHER, 400])
    found = logits(ours("long", **settings), documents)
    monkeypatch.setattr(ema, "scan", recurrence)
    worst = apart(found, logits(ours("long", **settings).double(), documents))
    print(f"{variant}: {worst:.1e}")
    assert worst <= 1e-4


def test_a_norm_that_transformers_forgot_to_apply_works():
    stream = 50 * torch.randn(10, 48)
    normed = ours(normalization_type="rmsnorm").backbone.layers[0].nffn.norm.norm
    torch.nn.init.ones_(normed.weight)
    assert torch.allclose(normed(stream).square().mean(-1).sqrt(), torch.ones(10), atol=1e-3)


def test_a_chunk_that_is_longer_than_any_document_is_refused():
    with pytest.raises(ValueError, match=r"backbone\.chunk_size=1000: expected at most backbone\.max_position=512"):
        ours(chunk_size=1000)


class Strides(TorchDispatchMode):
    """Record the largest stride of each matrix that a product reads or writes, unless it is a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
            self.found |= {max(matrix.stride()[-2:]) for matrix in (*args[-2:], out) if min(matrix.shape[-2:]) > 1}
        return out


def test_rows_of_all_products_on_a_gpu_are_aligned(monkeypatch):
    monkeypatch.setattr(state_passing, "HAS_KERNEL", False)  # it runs on a GPU
    lengths = torch.randint(1, 9 * CHUNK, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    ends, backbone = torch.tensor([0, *lengths]).cumsum(0).int(), ours().backbone.train()
    with assume_gpu(), Strides() as strides:
        for compiled in (False, True):
            backbone.is_compiled = compiled
            with torch.autocast("cpu", torch.bfloat16):
                hidden = backbone(torch.cat(ids(lengths)), ends, max(lengths), torch.arange(0, sum(lengths), 3))
            hidden.sum().backward()
    assert len(strides.found) > 5
    assert not [stride for stride in strides.found if stride % 8]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [[1], [CHUNK] * 3, [*UNSHARDED, *OTHER]], ids=["a token", "whole chunks", "any"])
def test_buckets_for_a_gpu_and_for_a_compiler_change_nothing(variant, lengths):
    results = []
    for on_gpu, compiled in ((False, False), (True, False), (True, True)):
        model = ours(**VARIANTS[variant])
        model.backbone.is_compiled = compiled
        with assume_gpu() if on_gpu else nullcontext():  # in double precision, which the kernel does not take
            hidden = model.double().backbone(torch.cat(ids(lengths)), torch.tensor([0, *lengths]).cumsum(0), max(lengths))
            hidden.square().sum().backward()
        results.append([hidden.detach(), *(weight.grad for weight in model.backbone.parameters())])
    for expected, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def keep() -> None:
    """Write what transformers' MEGA gives."""
    kept = {}
    for variant, settings in VARIANTS.items():
        other = theirs(ours(**settings))
        kept[variant] = torch.cat([padded_by_hand(other, document)[:, ::EVERY] for document in ids([*UNSHARDED, *OTHER])])
    save_file(kept, KEPT)


if __name__ == "__main__":
    keep()
