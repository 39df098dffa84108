"""Fit the weights that a run starts from to its backbone.

A wider backbone takes each matrix in its centre, and repeats it around; a deeper one takes its layers several times, as
ModernBERT-large was initialised from base (Warner et al. 2024, arXiv:2412.13663, section 3). Under another tokenizer a token
takes the embedding of the token with the same spelling, or the mean of the old tokens that spell it: Dobler and de Melo 2023,
arXiv:2305.14481.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from modernenc.backbones import Backbone
from modernenc.config import Run
from modernenc.data.tokenizer import ROLE_NAMES, check_same_ids
from modernenc.model.build import weights_of
from modernenc.model.init_source import Source

_LAYER = re.compile(r"^(backbone\.layers\.)(\d+)(\..+)$")
_BY_TOKEN = ("decoder.weight", "decoder.bias")
"""Weights with a row per token, besides the embedding."""


@torch.no_grad()
def fill(model: Any, source: Source, run: Run, tokenizer: Path) -> list[str]:
    """Initialise a `MaskedLM` from a source that was read; return the names of weights that the source lacks.

    Raises ValueError, naming the weight, if one is larger in the source, or if the vocabulary does not fit.
    """
    old, new = source.backbone.describe(), model.backbone.describe()
    layers = map_layers(old.layer_types, new.layer_types, run.init.layer_mapping)
    weights = _match_tokenizer(source, model, run, tokenizer)
    left = []
    for name, target in weights_of(model).items():
        origin = _LAYER.sub(lambda match: f"{match[1]}{layers[int(match[2])]}{match[3]}", name)
        if origin not in weights:
            left.append(name)
            continue
        old_sizes, new_sizes = old.split_sizes(origin), new.split_sizes(name)
        parts = weights[origin].split(old_sizes) if old_sizes else [weights[origin]]
        targets = target.split(new_sizes) if new_sizes else [target]
        for part, filled in zip(parts, targets, strict=True):
            if part.ndim != filled.ndim or any(n < o for n, o in zip(filled.shape, part.shape, strict=True)):
                raise ValueError(
                    f"init.source={run.init.source}: {origin} is {tuple(part.shape)} there, {name} {tuple(filled.shape)} here; "
                    "a backbone can only start from one that is not wider"
                )
            filled.copy_(tile_weight(part, filled.shape))
    return left


def map_layers(old: Sequence[str], new: Sequence[str], mapping: str) -> list[int]:
    """Return for each new layer the index of the old layer that it takes, given the attention types of both.

    `mapping` is by_depth, the layer at the same relative depth, or by_type, the nearest of those with the same type.
    """
    chosen = []
    for index, kind in enumerate(new):
        depth = index * len(old) / len(new)
        alike = [layer for layer, other in enumerate(old) if other == kind] if mapping == "by_type" else []
        nearest = min(round(depth), len(old) - 1)
        chosen.append(min(alike, key=lambda layer, depth=depth: abs(layer - depth)) if alike else nearest)
    return chosen


def tile_weight(old: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor of a shape at least as large as `old`'s, with `old` in its centre, repeated to all sides."""
    for dimension, size in enumerate(shape):
        had = old.shape[dimension]
        if size != had:
            old = old.index_select(dimension, (torch.arange(size) - (size - had) // 2) % had)
    return old


def _match_tokenizer(source: Source, model: Any, run: Run, tokenizer: Path) -> dict[str, Tensor]:
    """Return the source's weights with a row for each token of the run's tokenizer.

    Raises FileNotFoundError if `init.tokenizer` is not there, ValueError if it is not set and the vocabularies differ.
    """
    embedding = _embedding_name(source.backbone)
    if not run.init.tokenizer:
        there, here = source.weights[embedding].shape[0], model.backbone.vocab_size
        if there != here:
            raise ValueError(
                f"init.source={run.init.source} has {there} embeddings, backbone.vocab_size is {here}; set backbone.vocab_size="
                f"{there}, or, for another tokenizer, init.tokenizer=FILE, the tokenizer.json of the source"
            )
        if source.tokenizer.is_file():
            remedy = f", or, to carry the embeddings over, set init.tokenizer={source.tokenizer}"
            check_same_ids(source.tokenizer, tokenizer, f"init.source={run.init.source}", remedy)
        return source.weights
    if not Path(run.init.tokenizer).is_file():
        raise FileNotFoundError(f"init.tokenizer={run.init.tokenizer} does not exist; name the tokenizer.json of the source")
    old, new = Tokenizer.from_file(run.init.tokenizer), Tokenizer.from_file(str(tokenizer))
    old.no_padding()  # padding is no part of a token's spelling
    old.no_truncation()
    spelling = spell_with(old, new)
    by_token = {name for name in (embedding, *_BY_TOKEN) if name in source.weights}
    size = model.backbone.vocab_size
    return {**source.weights, **{name: transfer_embeddings(source.weights[name], spelling, size) for name in by_token}}


def spell_with(old: Tokenizer, new: Tokenizer) -> dict[int, list[int]]:
    """Return for each new token the old tokens that spell it; special tokens map by role."""
    known = old.get_vocab()
    roles = {name: names for names in ROLE_NAMES.values() for name in names}
    spelling = {}
    for token, number in new.get_vocab().items():
        same = [known[name] for name in (token, *roles.get(token, ())) if name in known]
        spelling[number] = same[:1] or old.encode(new.decode([number]), add_special_tokens=False).ids
    return spelling


def transfer_embeddings(rows: Tensor, spelling: dict[int, list[int]], size: int) -> Tensor:
    """Return an embedding for each of `size` new tokens: the mean of the old tokens' embeddings that spell it, or of all.

    `rows` are the old embeddings, one row a token, and `spelling` gives the old tokens of each new one.
    """
    out = rows.mean(0).expand(size, *rows.shape[1:]).clone()
    for number, tokens in spelling.items():
        if tokens:
            out[number] = rows[tokens].mean(0)
    return out


def _embedding_name(backbone: Backbone) -> str:
    weight = backbone.token_embeddings().weight
    return next(f"backbone.{name}" for name, value in cast(nn.Module, backbone).named_parameters() if value is weight)
