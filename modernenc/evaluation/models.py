"""The models that are evaluated: what a command line names becomes a Hugging Face folder, which every suite reads."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open

from modernenc.evaluation.claims import wait_for
from modernenc.hashing import hash_file
from modernenc.model.export import export
from modernenc.run_folder.load import locate
from modernenc.saved_config import CONFIG

log = logging.getLogger(__name__)

CACHE = "models"
"""Folder, in that of the results, of exported checkpoints and of twins with random weights."""
RANDOM = " (random)"
_CONTENT = (
    "*.json",
    "*.safetensors",
    "*.bin",
    "*.txt",
    "*.model",
    "*/config.json",
    "*_Dense/*.safetensors",
    "*_Dense/*.bin",
)
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True)
class Model:
    """An encoder as a Hugging Face folder."""

    name: str
    """As the tables call it."""
    folder: Path
    fingerprint: str
    """Hash of its files, so that the same weights are the same model wherever they lie."""


def find_models(arguments: Sequence[str], out: Path) -> list[Model]:
    """Return the models that arguments name: NAME=PATH, or a path, whose name is its last parts.

    Raises FileNotFoundError or ValueError for a path that holds no model, and ValueError for two models of one name.
    """
    models = [_find(argument, out) for argument in arguments]
    for number, model in enumerate(models):
        same = [other for other in models[:number] if other.name == model.name]
        if same and same[0].fingerprint != model.fingerprint:
            raise ValueError(f"{arguments[number]}: another model is called {model.name} too; name it: NAME={model.folder}")
    for number, model in enumerate(models):
        if first := next((other for other in models[:number] if other.fingerprint == model.fingerprint), None):
            log.warning("%s has the files of %s: it is evaluated once", model.name, first.name)
    return list({model.fingerprint: model for model in reversed(models)}.values())[::-1]


def random_twin(model: Model, out: Path) -> Model:
    """Return a model of the same configuration and tokenizer with fresh weights: what training has to be better than."""
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    folder = out / CACHE / f"random-{model.fingerprint}"
    with wait_for(folder):
        if not folder.exists():
            know_mega(model.folder)
            torch.manual_seed(0)
            twin = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(model.folder))
            partial = folder.with_name(f"{folder.name}.tmp")
            twin.save_pretrained(partial)
            AutoTokenizer.from_pretrained(model.folder).save_pretrained(partial)
            partial.rename(folder)
    return Model(model.name + RANDOM, folder, _fingerprint(folder))


def know_mega(folder: Path) -> None:
    """Let transformers load an exported MEGA with the code of this installation."""
    if '"mega"' in (text := (folder / "config.json").read_text()) or '"modernenc-mega"' in text:
        import modernenc.hugging_face.modeling_mega  # noqa: F401  (importing it registers the classes)


def max_positions(config: Any) -> int:
    """Return the number of tokens that a model of this configuration reads at most."""
    return next((getattr(config, key) for key in ("max_position_embeddings", "max_positions") if hasattr(config, key)), 1 << 62)


def _find(argument: str, out: Path) -> Model:
    name, equals, place = argument.partition("=")
    path = Path(place if equals else argument)
    if path.suffix == ".ckpt" or (path / CONFIG).is_file():
        folder = _exported(path, out)
        parts = (path.resolve().parts[-3], path.stem) if path.suffix == ".ckpt" else path.resolve().parts[-2:]
    elif (path / "config.json").is_file():
        folder, parts = path, path.parts[-1:]
    elif path.exists():
        raise ValueError(f"{path}: neither a run folder, a checkpoint, nor a Hugging Face folder (which has a config.json)")
    else:
        folder, parts = _downloaded(str(path)), path.parts[-1:]
    _check_known(folder)
    return Model(name if equals else "/".join(parts), folder, _fingerprint(folder))


def _check_known(folder: Path) -> None:
    """Raise ValueError for a model that needs code of its own, which is not run, and for one without a tokenizer."""
    from transformers import CONFIG_MAPPING

    know_mega(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is no JSON: {error}") from error
    if config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"{folder}: transformers has no model_type {config.get('model_type')}; code in a folder is not run")
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; save the model again") from error
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise FileNotFoundError(f"{folder}: no tokenizer ({', '.join(_TOKENIZERS)}); save it with save_pretrained")


def _exported(path: Path, out: Path) -> Path:
    """Return the folder that a run's newest checkpoint, or a checkpoint, is exported to, once."""
    _, checkpoint = locate(path)
    if checkpoint is None:
        raise FileNotFoundError(f"{path} holds no checkpoint yet: nothing to evaluate")
    folder = out / CACHE / hash_file(checkpoint)
    with wait_for(folder):
        if not folder.exists():
            export([checkpoint], folder)
    return folder


def _downloaded(name: str) -> Path:
    """Return the folder of a model of the hub, which is downloaded unless it is in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_CONTENT)))
    except (HFValidationError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"{name}: there is no run, checkpoint or Hugging Face folder of this name here, and the hub gave none: {reason}"
        ) from error


def _fingerprint(folder: Path) -> str:
    """Hash the names and the contents of a model's files; of weights in two formats, safetensors count."""
    files = sorted(path for pattern in _CONTENT for path in folder.glob(pattern) if path.is_file())
    safe = {path.parent for path in files if path.suffix == ".safetensors"}
    files = [path for path in files if path.suffix != ".bin" or path.parent not in safe]
    if not any(path.suffix in (".safetensors", ".bin") for path in files):
        raise FileNotFoundError(f"{folder}: no weights (model.safetensors); save the model with save_pretrained")
    digest = xxhash.xxh3_64()
    for path in files:
        digest.update(f"{path.relative_to(folder)} {hash_file(path)}\n".encode())
    return digest.hexdigest()
