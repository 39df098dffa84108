"""Backbones of random legal settings equal an independent computation in double precision, one document at a time."""

import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modernenc import ranges
from modernenc.backbones.eurobert import EuroBERT
from modernenc.backbones.mega import Mega
from modernenc.backbones.modernbert import ModernBERT
from modernenc.hugging_face import converter_of
from modernenc.kernels.buckets import FEW_LENGTHS_UP_TO, MULTIPLE, SHORTEST
from modernenc.kernels.documents import SEGMENT
from modernenc.objectives.masked_lm import MaskedLM
from support.tensors import relative

VOCAB, LONGEST = 50, 530
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Largest distance from double precision, relative to the norm, of logits and of gradients."""


def draw_lengths(rng: random.Random, *edges: int) -> list[int]:
    """Return lengths of documents at and around multiples of sizes that matter."""
    around = [1, *(times * edge + more for edge in edges for times in (1, 2, 3) for more in (-1, 0, 1))]
    return rng.sample(sorted({length for length in around if 0 < length <= LONGEST}), 4)


def build_masked_lm(backbone: Any, kinds: dict[str, Any], settings: dict[str, Any]) -> MaskedLM:
    """Check that the settings are legal, and return masked LM over the backbone, with weights that make every part matter."""
    for name, value in settings.items():
        ranges.check(name, kinds[name], value)
    model = MaskedLM(backbone).eval()
    for name, weight in model.named_parameters():
        if "ema_gate" not in name:
            torch.nn.init.normal_(weight, mean=float("norm" in name and weight.ndim == 1), std=0.3 / weight.shape[-1] ** 0.3)
    return model


def check(ours: MaskedLM, theirs: Any, logits: Callable[[Tensor], Tensor], lengths: list[int]) -> None:
    """Compare logits and gradients with those of `theirs`, whose `logits` are of one document."""
    # transformers gives token 0, its padding, no gradient.
    documents = [torch.randint(1, VOCAB, (length,)) for length in lengths]
    expected = torch.cat([logits(document) for document in documents])
    weight = torch.randn_like(expected) / expected.numel()
    (expected * weight).sum().backward()
    converter = converter_of(ours.backbone)
    grads = converter.from_hugging_face({name: value.grad for name, value in theirs.named_parameters()})
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    for dtype, tolerance in TOLERANCE.items():
        ours.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = ours.logits(torch.cat(documents), ends, max(lengths), torch.arange(sum(lengths)))
        assert relative(found.double(), expected) <= tolerance, f"logits in {dtype}"
        (found.double() * weight).sum().backward()
        pairs = [(value.grad, grads[name]) for name, value in ours.named_parameters()]
        one, other = (torch.cat([grad.flatten().double() for grad in side]) for side in zip(*pairs, strict=True))
        assert relative(one, other) <= tolerance, f"gradients in {dtype}"


@pytest.mark.parametrize("seed", range(8))
def test_any_modernbert_equals_that_of_transformers(seed):
    from transformers import AutoModelForMaskedLM

    rng = random.Random(seed)
    torch.manual_seed(seed)
    heads, local = rng.randint(1, 4), 2 * rng.choice((1, 3, 8, 20, 32, 50, 400))
    settings = {
        "vocab_size": VOCAB, "hidden_size": 2 * heads * rng.randint(4, 9), "intermediate_size": rng.randint(1, 70),
        "num_hidden_layers": rng.randint(1, 4), "num_attention_heads": heads, "max_position": LONGEST,
        "global_rope_theta": rng.uniform(1, 1e5), "local_rope_theta": rng.uniform(1, 1e5),
        "global_attn_every_n_layers": rng.randint(1, 5), "local_attention": local, "norm_eps": 10 ** rng.uniform(-9, -3),
    }  # fmt: skip
    ours = build_masked_lm(ModernBERT(**settings), get_type_hints(ModernBERT.__init__, include_extras=True), settings)
    converter = converter_of(ours.backbone)
    roles = {f"{role}_token_id": 1 for role in ("cls", "sep", "bos", "eos")}
    config = converter.new_model(ours.backbone, **roles).config
    theirs = AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa").eval()
    theirs.load_state_dict(converter.to_hugging_face(ours.state_dict()))
    theirs.double()
    lengths = draw_lengths(rng, local // 2, SHORTEST, MULTIPLE, FEW_LENGTHS_UP_TO)
    check(ours, theirs, lambda document: theirs(input_ids=document[None]).logits[0], lengths)


@pytest.mark.parametrize("seed", range(6))
def test_any_eurobert_equals_that_of_transformers(seed):
    transformers = pytest.importorskip("transformers", "5", reason="transformers 4 has no EuroBERT")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shared, group = rng.randint(1, 3), rng.randint(1, 3)
    settings = {
        "vocab_size": VOCAB, "hidden_size": 2 * shared * group * rng.randint(4, 9), "intermediate_size": rng.randint(1, 70),
        "num_hidden_layers": rng.randint(1, 4), "num_attention_heads": shared * group, "num_key_value_heads": shared,
        "max_position": LONGEST, "rope_theta": rng.uniform(1, 1e5), "norm_eps": 10 ** rng.uniform(-9, -3),
        "tie_word_embeddings": rng.random() < 0.5,
    }  # fmt: skip
    ours = build_masked_lm(EuroBERT(**settings), get_type_hints(EuroBERT.__init__, include_extras=True), settings)
    converter = converter_of(ours.backbone)
    config = converter.new_model(ours.backbone, mask_token_id=1, bos_token_id=1, eos_token_id=1).config
    theirs = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation="sdpa").eval()
    theirs.load_state_dict(converter.to_hugging_face(ours.state_dict()))
    theirs.double()
    lengths = draw_lengths(rng, SHORTEST, MULTIPLE, FEW_LENGTHS_UP_TO)
    check(ours, theirs, lambda document: theirs(input_ids=document[None]).logits[0], lengths)


def plain_ema(gate: Any, x: Tensor) -> Tensor:
    """Each token by a sum over all others, weighted by the kernel at their distance."""
    ema, places = gate.coefficients(x.dtype), torch.arange(len(x))
    out = x * gate.residual_weight
    for direction, distance in enumerate((places[:, None] - places, places - places[:, None])):
        kernel = torch.einsum("hs,hst->th", ema.gain[direction], (ema.log_decay[direction][..., None] * places).exp())
        out = out + torch.einsum("tuh,uh->th", kernel[distance.clamp(min=0)] * (distance >= 0)[..., None], x)
    return F.silu(out)


def plain_mega(model: Any, document: Tensor) -> Tensor:
    """The logits of one document, chunk by chunk, in the words of the paper."""
    backbone, length = model.backbone, len(document)
    chunk, settings = backbone.chunk_size, backbone.settings
    stream = backbone.token_embeddings()(document)
    for layer in backbone.layers:
        mega = layer.mega_layer
        x = mega.norm(stream)
        v, x_ema = F.silu(mega.v_proj(x)), plain_ema(mega.ema_gate, x)
        phi, z, gamma, h = mega.mx_proj(x_ema).split(mega.widths, -1)
        z, kappa = F.silu(z), mega.qk_weight
        if settings["normalize_attention"]:
            z, kappa = z / z.norm(dim=-1, keepdim=True).clamp(min=1e-12), kappa + 1
        o = []
        for start in range(0, length, chunk):
            part = z[start : start + chunk]
            q, k = part * kappa[0] + mega.qk_bias[0], part * kappa[1] + mega.qk_bias[1]
            bias = mega.rel_pos_bias
            if settings["relative_positional_bias"] == "simple":
                places = torch.arange(len(part))
                bias = bias.rel_pos_bias[chunk - 1 + places - places[:, None]]
            else:
                bias = bias(len(part))
            if settings["attention_activation"] == "laplace":
                s = q @ k.T / len(part) + bias
                probs = torch.distributions.Normal(0.5**0.5, (0.25 / torch.pi) ** 0.5).cdf(s)
            else:
                scale = 1 if settings["normalize_attention"] else q.shape[-1] ** 0.5
                probs = (q @ k.T / scale + bias).softmax(-1)
            o.append(probs @ v[start : start + chunk])
        h = F.silu(h + mega.h_proj(torch.cat(o) * F.silu(gamma)))
        attended = phi.sigmoid() * h + (1 - phi.sigmoid()) * stream
        mlp = layer.nffn.fc2(F.silu(layer.nffn.fc1(layer.nffn.norm(attended))))
        stream = (stream if settings["two_hop_residual"] else attended) + mlp
    return model.decoder(model.head(stream))


@pytest.mark.parametrize("chunk", [1, 7, 8, 15, 16, 17, 48, 65, 80, 100, 200, 513])
def test_any_mega_equals_the_paper_computed_plainly(chunk):
    rng = random.Random(chunk)
    torch.manual_seed(chunk)
    kinds = get_type_hints(Mega.__init__, include_extras=True)
    words = ("normalization_type", "attention_activation", "relative_positional_bias")
    settings = {
        "vocab_size": VOCAB, "hidden_size": rng.randint(8, 12), "intermediate_size": rng.randint(1, 40),
        "nffn_hidden_size": rng.randint(1, 40), "num_hidden_layers": rng.randint(1, 2),
        "shared_representation_size": 2 * rng.randint(1, 9), "ema_projection_size": rng.randint(1, 5), "chunk_size": chunk,
        "max_position": LONGEST, "normalize_attention": rng.random() < 0.5, "two_hop_residual": rng.random() < 0.5,
        **{key: rng.choice(get_args(get_args(kinds[key])[1])) for key in words},
    }  # fmt: skip
    ours = build_masked_lm(Mega(**settings), kinds, settings)
    theirs: Any = deepcopy(ours).double()
    check(ours, theirs, lambda document: plain_mega(theirs, document), draw_lengths(rng, chunk, SEGMENT, SHORTEST))
