"""Find mistakes in a run's model, optimizer and first weights by building them, which takes the seconds of torch's import."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from modernenc.backbones.description import Description
from modernenc.config import Run
from modernenc.data.blocks import Corpus
from modernenc.model import optim
from modernenc.model.build import build_objectives
from modernenc.model.init_source import check_source, rate_note, read_source
from modernenc.model.initialization import fill
from modernenc.planning import estimate


def check_disk(run: Run) -> None:
    """Raise ValueError if the disk of the run folder cannot hold the checkpoints that the run keeps."""
    parameters, states = estimate.parameters(run)
    needed = 4 * (parameters + states) * (len(run.phases) + run.checkpoint.keep_last + 1)  # the oldest goes after the newest
    folder = next(folder for folder in (Path(run.run_dir).absolute(), *Path(run.run_dir).absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"run_dir={run.run_dir}: the checkpoints take up to {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB "
            "free; choose another run_dir, or lower checkpoint.keep_last"
        )


def check_backbone(run: Run) -> None:
    """Raise ValueError if the backbone cannot be built with its settings."""
    with _name_group_in_errors("backbone", run.backbone), torch.device("meta"):
        objectives = build_objectives(run)
        backbone: Any = objectives.backbone
    if run.init.unigram and objectives.masked_lm.decoder.bias is None:
        raise ValueError(f"init.unigram=true: the decoder of {type(backbone).__name__} has no bias; set init.unigram=false")
    wanted = [name for name, phase in run.phases.items() if phase.causal_share]
    if wanted and "causal" not in signature(backbone.forward).parameters:
        raise ValueError(
            f"phases.{wanted[0]}.causal_share={run.phases[wanted[0]].causal_share:g}: {type(backbone).__name__} cannot be "
            "causal; set 0, or give its forward the argument `causal`"
        )


def check_init(run: Run, corpus: Corpus) -> list[str]:
    """Return notes on the first weights; ValueError or FileNotFoundError if there are none, or they do not fit."""
    if not run.init.source:
        return []
    source = read_source(Path(run.init.source), run)
    notes = check_source(source, run)
    fill(build_objectives(run).masked_lm, source, run, corpus.tokenizer_file)
    return [*notes, rate_note(source, run)]


def check_optim(run: Run) -> None:
    """Raise ValueError if the optimizers cannot be built with their settings."""
    linear = nn.Linear(2, 2)  # any weights will do to check the settings
    backbone = SimpleNamespace(describe=lambda: Description([linear], ["linear"], lambda length: 0.0))
    objectives: Any = SimpleNamespace(masked_lm=linear, backbone=backbone, tasks=nn.ModuleDict())
    with _name_group_in_errors("optim", run.optim):
        optim.build(objectives, run.optim)


@contextmanager
def _name_group_in_errors(group: str, node: dict[str, Any]) -> Iterator[None]:
    """Name the group of settings in an error of what is built."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if str(error).startswith(group):
            raise
        name = node["_target_"].rpartition(".")[2]
        said = str(error).partition("\n")[0]  # torch adds frames of C++
        raise ValueError(f"{group}: {name} cannot be built with these settings: {said}") from error
