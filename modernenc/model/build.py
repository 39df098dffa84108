"""Build the model of a run, and load weights into it."""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import get_class
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from modernenc.backbones import Backbone
from modernenc.backbones.attention import kernels, use_flash_attention_3, use_window_kernel
from modernenc.config import Run, Trainer
from modernenc.curriculum import StepSpec
from modernenc.kernels.device import use_gpu_kernels
from modernenc.objectives import Objectives
from modernenc.objectives.masked_lm import MaskedLM

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable that tells torch where to keep what it compiled."""


def build_objectives(run: Run) -> Objectives:
    """Return all that a run trains, freshly initialised from the run's seed."""
    torch.manual_seed(run.seed)
    return Objectives(masked_lm_with(run.backbone), run.tasks)


def masked_lm_with(backbone: dict[str, Any]) -> MaskedLM:
    """Return masked LM over the backbone that `_target_` and its arguments specify."""
    arguments = {key: value for key, value in backbone.items() if key != "_target_"}
    return MaskedLM(cast(Backbone, get_class(backbone["_target_"])(**arguments)))


def checkpoint_activations(backbone: Backbone, every: int) -> None:
    """Let each `every`-th layer recompute its activations in the backward pass; 0 means none.

    On a GPU what attention returned is kept, unless the package flash-attn computes it: it is small beside the rest, and takes
    the longest to compute.
    """
    if not every:
        return
    keeping = partial(create_selective_checkpoint_contexts, kernels())
    for layer in backbone.describe().layers[::every]:
        layer.forward = partial(_recomputing, layer.forward, keeping)


def _recomputing(forward: Callable[..., Tensor], keeping: Callable[..., Any], hidden: Tensor, *arguments: Any) -> Tensor:
    # A CPU has none of these operators, and looking for them would take it a tenth longer.
    kept = keeping if use_gpu_kernels(hidden.device) else noop_context_fn
    return checkpoint(forward, hidden, *arguments, use_reentrant=False, context_fn=kept)


def compile_layers(backbone: Backbone) -> None:
    """Compile the layers of a backbone with torch.compile.

    Sizes are dynamic from the first call, and two sizes that were equal once are not assumed to stay equal, so that one graph
    serves any documents.
    """
    from torch import _dynamo
    from torch.fx.experimental import _config as sizes

    sizes.use_duck_shape = False
    # Types of layers, with and without activation checkpointing, in training and in validation.
    _dynamo.config.recompile_limit = 32
    for part in backbone.describe().compilable:
        part.forward = torch.compile(part.forward, dynamic=True, fullgraph=True)
    setattr(backbone, "is_compiled", True)  # noqa: B010  # most backbones do not need to know


def compiles(trainer: Trainer, device: torch.device) -> bool:
    """Return whether layers are compiled: on a GPU in bf16, unless the recipe says no, and with Triton at hand.

    Under strict determinism they are not: how a compiled sum over tokens is split depends on the first batch that the compiler
    saw, which is another one after a resume.
    """
    wanted = trainer.compile and trainer.precision == "bf16-mixed" and trainer.determinism == "fast"
    return wanted and device.type == "cuda" and bool(find_spec("triton"))


def speed_up(backbone: Backbone, trainer: Trainer, device: torch.device) -> None:
    """Let the layers of a backbone compute on a device as the settings say, where that is outside the training loop."""
    use_window_kernel(trainer.window_kernel)
    use_flash_attention_3(device)
    checkpoint_activations(backbone, trainer.activation_checkpointing_every)
    if compiles(trainer, device):
        keep_compiled_code()
        compile_layers(backbone)


def keep_compiled_code() -> str:
    """Let torch keep what it compiles in the user's cache folder, unless `TORCHINDUCTOR_CACHE_DIR` is set; return the folder.

    It is code, and torch's default is a folder in the one for temporary files, which all users share.
    """
    if not os.environ.get(CACHE_VARIABLE):
        with suppress(OSError, RuntimeError):  # where there is no home that can be written to, torch's default has to do
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modernenc" / "compiled"
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(folder, os.W_OK):
                os.environ[CACHE_VARIABLE] = str(folder)
    return os.environ.get(CACHE_VARIABLE, "torch's own cache")


def set_attributes(backbone: Backbone, spec: StepSpec) -> None:
    """Set the attributes of the backbone that its phase prescribes."""
    for name, value in spec.backbone.items():
        setattr(backbone, name, value)


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and saved buffers by name, each once: tied parameters appear under their first name."""
    saved = module.state_dict()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    return {**dict(module.named_parameters()), **buffers}


def masked_lm_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of the backbone and of masked LM in a checkpoint, by their names in `MaskedLM`."""
    shared = ("backbone.", "masked_lm.")
    return {name.removeprefix("masked_lm."): value for name, value in weights.items() if name.startswith(shared)}


@torch.no_grad()
def load_weights(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Fill a module with the weights of a checkpoint; ValueError if names or shapes differ."""
    own = weights_of(module)
    for name in sorted(own.keys() | weights.keys()):
        if name not in own or name not in weights or own[name].shape != weights[name].shape:
            has = tuple(weights[name].shape) if name in weights else "nothing"
            needs = tuple(own[name].shape) if name in own else "nothing"
            raise ValueError(f"the checkpoint has {has} for {name}, the backbone needs {needs}: it is of another recipe")
        own[name].copy_(weights[name])
