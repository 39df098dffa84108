"""Read the model that a run starts from: a checkpoint of any run, or the folder of a Hugging Face model."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from torch import Tensor

from modernenc.backbones import Backbone
from modernenc.config import Run
from modernenc.curriculum import Curriculum, StepSpec
from modernenc.data.blocks import TOKENIZER
from modernenc.hugging_face import converter_of
from modernenc.hugging_face.read_folder import read_config, read_config_file, read_folder
from modernenc.model.build import masked_lm_weights, masked_lm_with
from modernenc.run_folder import checkpoints
from modernenc.run_folder.checkpoints import Checkpoint
from modernenc.run_folder.create import CORPUS
from modernenc.saved_config import from_plain, shipped

_DECAYED = 0.5
"""Fraction of its peak below which a learning rate counts as decayed."""


@dataclass
class Source:
    """The weights that a run starts from."""

    backbone: Backbone
    """A backbone of the source's shape, on the meta device."""
    settings: dict[str, Any]
    """Arguments of the backbone at the time when the weights were saved."""
    weights: dict[str, Tensor]
    """Tensors by their names in a `MaskedLM`."""
    tokenizer: Path
    """Its tokenizer.json, which may be missing."""
    lr: float = 0.0
    """Learning rate when they were saved, on the scale of its `optim.lr`; 0 if nothing says it."""
    peak_lr: float = 0.0
    """The highest one until then."""


def read_source(path: Path, run: Run) -> Source:
    """Return the weights that `init.source` names; FileNotFoundError or ValueError if there are none, or they are not whole."""
    if path.suffix == ".ckpt":
        return _read_checkpoint(path)
    kind: Any = get_class(run.backbone["_target_"])
    return Source(*read_folder(path, kind), (path if path.is_dir() else path.parent) / TOKENIZER)


def backbone_of(path: Path) -> dict[str, Any]:
    """Return `_target_` and the arguments of the backbone at a path; FileNotFoundError or ValueError if there is none."""
    if path.suffix == ".ckpt":
        checkpoint = checkpoints.read(path)
        trained = from_plain(checkpoint.run)
        return {**trained.backbone, **_last_step(trained, checkpoint).backbone}
    config = read_config_file(path)
    kinds = {target: get_class(target) for target in sorted(shipped("backbone"))}
    types = {name: target for target, kind in kinds.items() for name in converter_of(kind).model_types}
    named = config.get("model_type")
    if named not in types:
        raise ValueError(f"{path} is of model_type {named}; expected {' or '.join(types)}")
    return {"_target_": types[named], **read_config(config, kinds[types[named]], str(path))}


def check_source(source: Source, run: Run) -> list[str]:
    """Return notes on settings under which the run's backbone computes something else than the source with the same weights.

    That may be intended for what a phase can change too, such as a rotary base. Any other setting that differs, apart from
    sizes, raises ValueError: under another attention window, norm or activation the weights are of no use.
    """
    kind, where = type(source.backbone), f"init.source={run.init.source}"
    if kind is not get_class(run.backbone["_target_"]):
        raise ValueError(f"{where} is a {kind.__name__}, which backbone._target_={run.backbone['_target_']} cannot begin with")
    parameters = inspect.signature(kind).parameters
    first = next(iter(run.phases))
    begins = {**run.backbone, **run.phases[first].backbone}
    here, there = (
        {name: settings.get(name, parameter.default) for name, parameter in parameters.items()}
        for settings in (begins, source.settings)
    )
    notes = []
    resizable = source.backbone.describe().resizable
    for key in (key for key in parameters if key not in resizable and here[key] != there[key]):
        place = f"phases.{first}.backbone" if key in run.phases[first].backbone else "backbone"
        if key not in kind.PHASE_ATTRIBUTES:
            raise ValueError(
                f"{where} has {key}={there[key]}, the run {here[key]}: its weights would compute something else; set "
                f"{place}.{key}={there[key]}"
            )
        notes.append(
            f"{where} has {key}={there[key]}, the run begins with {here[key]}: at first its weights compute something else; "
            f"unless that is meant, set {place}.{key}={there[key]}"
        )
    if "num_attention_heads" in parameters and here["hidden_size"] >= there["hidden_size"]:
        widths = [settings["hidden_size"] / settings["num_attention_heads"] for settings in (here, there)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"{where} has heads of {widths[1]:g}, backbone.num_attention_heads={here['num_attention_heads']} makes heads "
                f"of {widths[0]:g}: its weights would compute something else; set backbone.num_attention_heads="
                f"{round(here['hidden_size'] / widths[1])} and a backbone.hidden_size that divides so"
            )
    return notes


def rate_note(source: Source, run: Run) -> str:
    """Return whether a source is taken for decayed, so that its learning rate must rise again, and what to do if it is not."""
    where = f"init.source={run.init.source}"
    again = f"the learning rate rises again, to optim.lr={run.optim['lr']:g}"
    if not source.lr:
        return f"{where} does not say its learning rate, and is taken for decayed: {again}"
    if source.lr < _DECAYED * source.peak_lr:
        return f"{where} has decayed to {source.lr / source.peak_lr:.2g} of its peak learning rate: {again}"
    return (
        f"{where} has not decayed, its learning rate is {source.lr:g} of its own optimizer: a branch (+from={run.init.source}) "
        f"goes on with both; here the optimizer is new, and {again}"
    )


def _read_checkpoint(path: Path) -> Source:
    checkpoint = checkpoints.read(path)
    trained = from_plain(checkpoint.run)
    with torch.device("meta"):
        backbone = masked_lm_with(trained.backbone).backbone
    last = _last_step(trained, checkpoint)
    settings = {**trained.backbone, **last.backbone}
    tokenizer = path.resolve().parent.parent / CORPUS / TOKENIZER
    reached = list(trained.phases)[: list(trained.phases).index(checkpoint.state.phase) + 1]
    peak_lr = max(trained.phases[phase].lr for phase in reached)
    return Source(backbone, settings, masked_lm_weights(checkpoint.weights), tokenizer, last.lr, peak_lr)


def _last_step(trained: Run, checkpoint: Checkpoint) -> StepSpec:
    """Return what was prescribed for the step before a checkpoint."""
    return Curriculum.of(trained).at(max(0, checkpoint.state.tokens_seen - 1))
