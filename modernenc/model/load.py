"""Load a trained model from a checkpoint, for evaluation and export."""

from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from modernenc.config import Run
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.data.store import Store
from modernenc.hugging_face.read_folder import read_folder
from modernenc.model.build import load_weights, masked_lm_weights, masked_lm_with, set_attributes, weights_of
from modernenc.model.init_source import backbone_of
from modernenc.objectives.masked_lm import MaskedLM
from modernenc.objectives.multiple_choice import MultipleChoice
from modernenc.run_folder import checkpoints
from modernenc.run_folder.checkpoints import Checkpoint
from modernenc.run_folder.create import CORPUS
from modernenc.saved_config import from_plain


def small_corpus(run: Run) -> Corpus:
    """Return the corpus of a run as its folder holds it: manifest and tokenizer, without text."""
    return Corpus(
        Store(str(Path(run.run_dir) / CORPUS)), "its run folder has lost it; copy manifest.json and tokenizer.json there"
    )


def load_masked_lm(path: Path) -> MaskedLM:
    """Return masked LM with the weights of a checkpoint, in evaluation mode, its backbone as in the phase that was reached."""
    return masked_lm_of(checkpoints.read(path), path)


def masked_lm_of(checkpoint: Checkpoint, path: Path) -> MaskedLM:
    """Return masked LM with the weights of a checkpoint that was read from a path, in evaluation mode.

    The settings are those in the checkpoint, whose hash was verified. Raises ValueError, naming the path, if they and the
    weights do not fit each other.
    """
    try:
        run = from_plain(checkpoint.run)
        model = masked_lm_with(run.backbone)
        load_weights(model, masked_lm_weights(checkpoint.weights))
        set_attributes(model.backbone, Curriculum.of(run).at(max(0, checkpoint.state.tokens_seen - 1)))
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return model.eval()


def load_folder(folder: Path) -> MaskedLM:
    """Return masked LM with the weights of a Hugging Face folder, in evaluation mode.

    Raises FileNotFoundError or ValueError, naming the folder, if it holds no model that a backbone here follows exactly.
    """
    settings = backbone_of(folder)
    model = masked_lm_with(settings)
    weights, own = read_folder(folder, type(model.backbone))[2], weights_of(model)
    load_weights(model, {name: value for name, value in weights.items() if name in own})  # a tied decoder may be there twice
    return model.eval()


def choice_of(checkpoint: Checkpoint, masked_lm: MaskedLM, task: str, path: Path) -> MultipleChoice:
    """Return the head of a task in a checkpoint that was read from a path, in evaluation mode; it shares the backbone.

    Raises ValueError, naming the tasks there are, if the checkpoint has none of this name.
    """
    parts = [name.split(".", 2) for name in checkpoint.weights if name.startswith("tasks.")]
    tasks = sorted({part[1] for part in parts})
    if task not in tasks:
        raise ValueError(f"--task {task}: {path} has {', '.join(tasks) or 'no task'}")
    head = MultipleChoice(masked_lm.backbone)
    load_weights(head, {part[2]: checkpoint.weights[".".join(part)] for part in parts if part[1] == task})
    return head.eval()
