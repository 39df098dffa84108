"""The model of a run: fresh, or with the weights of a checkpoint."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.utils.checkpoint
from hydra.utils import get_class
from torch import nn

from modernenc import checkpoints
from modernenc.backbones import Backbone
from modernenc.config import Run, load
from modernenc.curriculum import Curriculum, Point
from modernenc.objectives import Objectives
from modernenc.objectives.masked_lm import MaskedLM


def build_objectives(run: Run) -> Objectives:
    """All that a run trains, freshly initialised; seeded by the run."""
    torch.manual_seed(run.seed)
    return Objectives(masked_lm_with(run.backbone), run.tasks)


def masked_lm_with(backbone: dict[str, Any]) -> MaskedLM:
    """Masked LM over the backbone that `_target_` and its arguments name."""
    arguments = {key: value for key, value in backbone.items() if key != "_target_"}
    return MaskedLM(cast(Backbone, get_class(backbone["_target_"])(**arguments)))


def recompute(backbone: Backbone, every: int) -> None:
    """Have every so many-th block make its activations again in the backward pass; 0 means none."""
    for block in backbone.describe().layers[::every] if every else []:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def compile_parts(backbone: Backbone) -> None:
    """Have torch's compiler make few kernels of many.

    Sizes are dynamic from the first call, and not taken to be equal because they once were: so a graph serves any documents,
    and numbers do not depend on what ran before.
    """
    from torch import _dynamo
    from torch.fx.experimental import _config as sizes

    sizes.use_duck_shape = False
    _dynamo.config.recompile_limit = 32  # kinds of layers, made again or not, in training and in validation
    for part in backbone.describe().compilable:
        part.forward = torch.compile(part.forward, dynamic=True, fullgraph=True)


def set_backbone(backbone: Backbone, point: Point) -> None:
    """Give the backbone the attributes that its phase sets."""
    for name, value in point.backbone.items():
        setattr(backbone, name, value)


def locate(path: Path) -> tuple[Run, Path | None]:
    """The run and the whole checkpoint that a path names: a run folder's newest, or the checkpoint itself.

    There is no checkpoint yet in a run that was stopped before its first. Raises FileNotFoundError or ValueError, naming the
    file, for what is no run, or has no whole checkpoint left.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a run folder or one of its checkpoints/*.ckpt")
    named = path.suffix == ".ckpt"
    run_dir = path.resolve().parent.parent if named else path.resolve()
    run = load(run_dir)
    run.run_dir = str(run_dir)
    if not named:
        return run, checkpoints.newest(run_dir)
    checkpoints.check(path)
    return run, path.resolve()


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name, each once: tied ones go by their first name."""
    saved = module.state_dict()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    return {**dict(module.named_parameters()), **buffers}


def masked_lm_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a checkpoint's weights those of the backbone and of masked LM, by their names in `MaskedLM`."""
    shared = ("backbone.", "masked_lm.")
    return {name.removeprefix("masked_lm."): value for name, value in weights.items() if name.startswith(shared)}


@torch.no_grad()
def load_weights(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Fill a module with the weights of a checkpoint; ValueError when their names or shapes are not the same."""
    own = weights_of(module)
    for name in sorted(own.keys() | weights.keys()):
        if name not in own or name not in weights or own[name].shape != weights[name].shape:
            has = tuple(weights[name].shape) if name in weights else "nothing"
            needs = tuple(own[name].shape) if name in own else "nothing"
            raise ValueError(f"the checkpoint has {has} for {name}, the backbone needs {needs}: it is of another recipe")
        own[name].copy_(weights[name])


def load_masked_lm(run: Run, checkpoint: Path) -> MaskedLM:
    """Masked LM with a checkpoint's weights, its backbone as in the phase reached; not to be trained."""
    return masked_lm_of(run, checkpoints.read(checkpoint))


def masked_lm_of(run: Run, content: dict[str, Any]) -> MaskedLM:
    """The same from a checkpoint's content."""
    model = masked_lm_with(run.backbone)
    load_weights(model, masked_lm_weights(content["weights"]))
    set_backbone(model.backbone, Curriculum.of(run).at(content["state"]["tokens_seen"] - 1))
    return model.eval()
