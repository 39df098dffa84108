"""Weights to begin with: those of another run's checkpoint, or of a Hugging Face model, fitted to the backbone.

A wider backbone takes each matrix in its centre and again around it, a deeper one its layers several times, as ModernBERT-large
was made from base (Warner et al. 2024, arXiv:2412.13663, section 3). Under another tokenizer a token has the embedding of
the token that is written the same, or the mean of those that it is made of: Dobler and de Melo 2023, arXiv:2305.14481.
Random weights may begin with the frequencies of tokens.
"""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from hydra.utils import get_class
from jaxtyping import Integer
from torch import Tensor, nn

from modernenc.backbones import Backbone
from modernenc.config import Run
from modernenc.curriculum import reads_text
from modernenc.data.blocks import Corpus, Shards
from modernenc.hugging_face import folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

COUNTED_TOKENS = 1 << 20
"""Of each slice, for frequencies."""
_LAYER = re.compile(r"^(backbone\.layers\.)(\d+)(\..+)$")
_BY_TOKEN = ("decoder.weight", "decoder.bias")
"""Weights with a row per token, beside the embedding."""


@dataclass
class Source:
    """What weights are taken from."""

    backbone: Backbone
    """Of its shape; the weights are beside it."""
    settings: dict[str, Any]
    """Arguments of the backbone, as it stood when the weights were saved."""
    weights: dict[str, Tensor]
    """By their names in a `MaskedLM`."""


def read_source(path: Path, run: Run) -> Source:
    """The weights that `init.source` names; FileNotFoundError or ValueError when there are none, or they are not whole."""
    if path.suffix == ".ckpt":
        return _from_checkpoint(path)
    kind: Any = get_class(run.backbone["_target_"])
    return Source(*folder.read(path, kind))


def check_source(source: Source, run: Run) -> list[str]:
    """Where the run's backbone begins as another function of the same weights than the source was, in words.

    That may be meant for what a phase could change too, such as a rotary base. ValueError names any other setting that differs,
    but for sizes: under another window, norm or activation the weights are not what they were trained to be.
    """
    kind, said = type(source.backbone), f"init.source={run.init.source}"
    if kind is not get_class(run.backbone["_target_"]):
        raise ValueError(f"{said} is a {kind.__name__}, which backbone._target_={run.backbone['_target_']} cannot begin with")
    parameters = inspect.signature(kind).parameters
    first = next(iter(run.phases))
    begins = {**run.backbone, **run.phases[first].backbone}
    here, there = (
        {name: settings.get(name, parameter.default) for name, parameter in parameters.items()}
        for settings in (begins, source.settings)
    )
    notes = []
    for key in (key for key in parameters if key not in source.backbone.describe().resizable and here[key] != there[key]):
        place = f"phases.{first}.backbone" if key in run.phases[first].backbone else "backbone"
        if key not in kind.PHASE_ATTRIBUTES:
            raise ValueError(
                f"{said} has {key}={there[key]}, the run {here[key]}: its weights would compute something else; set "
                f"{place}.{key}={there[key]}"
            )
        notes.append(
            f"{said} has {key}={there[key]}, the run begins with {here[key]}: at first its weights compute something else; "
            f"unless that is meant, set {place}.{key}={there[key]}"
        )
    if "num_attention_heads" in parameters and here["hidden_size"] >= there["hidden_size"]:
        widths = [settings["hidden_size"] / settings["num_attention_heads"] for settings in (here, there)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"{said} has heads of {widths[1]:g}, backbone.num_attention_heads={here['num_attention_heads']} makes heads of "
                f"{widths[0]:g}: its weights would compute something else; set backbone.num_attention_heads="
                f"{round(here['hidden_size'] / widths[1])} and a backbone.hidden_size that divides so"
            )
    return notes


def initialise(model: Any, run: Run, tokenizer: Path) -> list[str]:
    """Fill a `MaskedLM` as `run.init` says; the names of weights that the source has nothing for, which stay as they are.

    `tokenizer` is the file of the run's. ValueError as by `fill`.
    """
    return fill(model, read_source(Path(run.init.source), run), run, tokenizer)


@torch.no_grad()
def fill(model: Any, source: Source, run: Run, tokenizer: Path) -> list[str]:
    """The same from a source that was read.

    ValueError names a weight that the source has too much of, or a vocabulary that does not fit.
    """
    from modernenc.model import weights_of

    old, new = source.backbone.describe(), model.backbone.describe()
    layers = layer_map(old.layer_types, new.layer_types, run.init.layers)
    weights = _under_tokenizer(source, model, run, tokenizer)
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
                    "a backbone begins with the weights of one that is not wider"
                )
            filled.copy_(tiled(part, filled.shape))
    return left


@torch.no_grad()
def begin_at_unigrams(model: Any, run: Run, corpus: Corpus) -> None:
    """Have an untrained `MaskedLM` predict each token by its frequency: Meister et al. 2023, arXiv:2212.09686.

    Frequencies are those of the first blocks of each slice in the first mix, plus one of each token. The bias is 0 for a token
    that is as rare as the average one read, since a logit near 0 is the finest in bf16.
    """
    size = len(model.decoder.bias)
    phase = next(phase for phase in run.phases.values() if reads_text(phase))
    frequencies, read = np.zeros(size), 0
    for name, share in corpus.slices(phase.mix).items():
        counts = _counts(corpus.open(name), size)
        frequencies += share * counts / counts.sum()
        read += counts.sum()
    frequencies = (frequencies * read + 1) / (read + size)
    nats = np.log(frequencies)
    model.decoder.bias.copy_(torch.from_numpy(nats - frequencies @ nats))


def layer_map(old: Sequence[str], new: Sequence[str], layers: str) -> list[int]:
    """Which old layer each new one takes, by their kinds."""
    taken = []
    for index, kind in enumerate(new):
        aim = index * len(old) / len(new)
        alike = [layer for layer, other in enumerate(old) if other == kind] if layers == "by_kind" else []
        nearest = min(round(aim), len(old) - 1)
        taken.append(min(alike, key=lambda layer, aim=aim: abs(layer - aim)) if alike else nearest)
    return taken


def tiled(old: Tensor, shape: Sequence[int]) -> Tensor:
    """`old` in the centre of a tensor of at least its size, repeated to all sides."""
    for dimension, size in enumerate(shape):
        had = old.shape[dimension]
        if size != had:
            old = old.index_select(dimension, (torch.arange(size) - (size - had) // 2) % had)
    return old


def _counts(shards: Shards, size: int) -> Integer[np.ndarray, " vocab"]:
    """How often each token is in the first blocks."""
    counts = np.zeros(size, np.int64)
    for shard, index in ((shard, index) for shard, blocks in enumerate(shards.sizes) for index in range(blocks)):
        counts += np.bincount(shards.read(shard, index).tokens, minlength=size)
        if counts.sum() >= COUNTED_TOKENS:
            break
    return counts


def _from_checkpoint(path: Path) -> Source:
    from modernenc import checkpoints
    from modernenc.branch import take_up
    from modernenc.curriculum import Curriculum
    from modernenc.model import masked_lm_weights, masked_lm_with

    content = checkpoints.read(path)
    trained = take_up(content, "")
    with torch.device("meta"):
        backbone = masked_lm_with(trained.backbone).backbone
    reached = Curriculum.of(trained).at(max(0, content["state"]["tokens_seen"] - 1)).backbone
    return Source(backbone, {**trained.backbone, **reached}, masked_lm_weights(content["weights"]))


def _under_tokenizer(source: Source, model: Any, run: Run, tokenizer: Path) -> dict[str, Tensor]:
    """The source's weights with a row for each token of the run's tokenizer."""
    embedding = _embedding_name(source.backbone)
    if not run.init.tokenizer:
        there, here = source.weights[embedding].shape[0], model.backbone.vocab_size
        if there != here:
            raise ValueError(
                f"init.source={run.init.source} has {there} embeddings, backbone.vocab_size is {here}; set backbone.vocab_size="
                f"{there}, or, for another tokenizer, init.tokenizer=FILE, the tokenizer.json of the source"
            )
        return source.weights
    from tokenizers import Tokenizer

    if not Path(run.init.tokenizer).is_file():
        raise FileNotFoundError(f"init.tokenizer={run.init.tokenizer} does not exist; name the tokenizer.json of the source")
    old, new = Tokenizer.from_file(run.init.tokenizer), Tokenizer.from_file(str(tokenizer))
    old.no_padding()  # a token is made of nothing else
    old.no_truncation()
    parts = made_of(old, new)
    by_token = {name for name in (embedding, *_BY_TOKEN) if name in source.weights}
    size = model.backbone.vocab_size
    return {**source.weights, **{name: transferred(source.weights[name], parts, size) for name in by_token}}


def made_of(old: "Tokenizer", new: "Tokenizer") -> dict[int, list[int]]:
    """Which old tokens each new one is written with; a special token has the old one of its role."""
    from data_prep.encode import ROLE_NAMES

    known = old.get_vocab()
    roles = {name: names for names in ROLE_NAMES.values() for name in names}
    parts = {}
    for token, number in new.get_vocab().items():
        same = [known[name] for name in (token, *roles.get(token, ())) if name in known]
        parts[number] = same[:1] or old.encode(new.decode([number]), add_special_tokens=False).ids
    return parts


def transferred(rows: Tensor, parts: dict[int, list[int]], size: int) -> Tensor:
    """A row for each of `size` tokens: the mean of those that it is made of, or of all, when it is made of none."""
    out = rows.mean(0).expand(size, *rows.shape[1:]).clone()
    for number, tokens in parts.items():
        if tokens:
            out[number] = rows[tokens].mean(0)
    return out


def _embedding_name(backbone: Backbone) -> str:
    weight = backbone.token_embeddings().weight
    return next(f"backbone.{name}" for name, value in cast(nn.Module, backbone).named_parameters() if value is weight)
