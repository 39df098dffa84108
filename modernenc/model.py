"""The model of a run: fresh, or with the weights of a checkpoint."""

from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import get_class

from modernenc.backbones import Backbone
from modernenc.config import Run, load
from modernenc.curriculum import Curriculum, Point
from modernenc.objectives.masked_lm import MaskedLM


def build_objective(run: Run) -> MaskedLM:
    """A freshly initialised objective; seeded by the run."""
    torch.manual_seed(run.seed)
    arguments = {key: value for key, value in run.backbone.items() if key != "_target_"}
    backbone = cast(Backbone, get_class(run.backbone["_target_"])(**arguments))
    return MaskedLM(backbone)


def set_backbone(backbone: Backbone, point: Point) -> None:
    """Give the backbone the attributes that its phase sets."""
    for name, value in point.backbone.items():
        setattr(backbone, name, value)


def locate(path: Path) -> tuple[Run, Path]:
    """The run and the whole checkpoint that a path names: a run folder's newest, or the checkpoint itself.

    Raises FileNotFoundError or ValueError, naming the file, when there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a run folder or one of its checkpoints/*.ckpt")
    named = path.suffix == ".ckpt"
    run_dir = path.resolve().parent.parent if named else path.resolve()
    run = load(run_dir)
    run.run_dir = str(run_dir)

    from modernenc import checkpoints  # Lightning takes seconds to import

    if not named:
        return run, checkpoints.newest(run_dir)
    checkpoints.check(path)
    return run, path.resolve()


def load_objective(run: Run, checkpoint: Path) -> tuple[MaskedLM, dict[str, Any]]:
    """The objective with a checkpoint's weights, its backbone as in the phase reached, and the checkpoint's own state."""
    from modernenc.checkpoints import STATE_KEY, AtomicCheckpointIO

    content = AtomicCheckpointIO().load_checkpoint(checkpoint)
    objective = build_objective(run)
    prefix = "objective."
    weights = {key.removeprefix(prefix): value for key, value in content["state_dict"].items() if key.startswith(prefix)}
    objective.load_state_dict(weights)
    state = content[STATE_KEY]
    set_backbone(objective.backbone, Curriculum(run.phases).at(state["tokens_seen"] - 1))
    return objective.eval(), state
