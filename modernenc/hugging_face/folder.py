"""A masked-LM model that `save_pretrained` wrote, read without transformers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from modernenc.backbones import Backbone
from modernenc.hugging_face import converter_of
from modernenc.hugging_face.config_json import arguments_from


def read(folder: Path, kind: type[Backbone]) -> tuple[Backbone, dict[str, Any], dict[str, Tensor]]:
    """Read a folder as a backbone of the given class on the meta device, its arguments, and the weights of a `MaskedLM`.

    Raises FileNotFoundError or ValueError, naming the folder as `init.source`, for what cannot be followed exactly.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"init.source={folder}: no config.json; name a checkpoint (*.ckpt) or a Hugging Face folder")
    config, converter = json.loads((folder / "config.json").read_text()), converter_of(kind)
    if config.get("model_type") not in converter.model_types:
        raise ValueError(
            f"init.source={folder} is of model_type {config.get('model_type')}, which {kind.__name__} cannot begin with; "
            f"expected {' or '.join(converter.model_types)}"
        )
    weights = converter.from_hugging_face(dict(_tensors(folder)))
    try:
        arguments = arguments_from(kind, config)
        with torch.device("meta"):
            backbone: Any = kind(**arguments)
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} has no {error}; expected what save_pretrained writes") from error
    own = {f"backbone.{name}" for name, _ in backbone.named_parameters()}
    lacking = sorted(own - weights.keys())
    if lacking:
        raise ValueError(f"init.source={folder} has no {lacking[0]}; expected a masked-LM model of transformers")
    unknown = sorted(name for name in weights if name.startswith("backbone.") and name not in own)
    if unknown:
        raise ValueError(f"init.source={folder} has {unknown[0]}, which {kind.__name__} has not here: other logits")
    return backbone, arguments, weights


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights in fp32, from safetensors or else from a .bin file, which is read without running code."""
    for path in sorted(folder.glob("*.safetensors")):
        yield from ((name, value.float()) for name, value in load_file(path).items())
    if not list(folder.glob("*.safetensors")):
        paths = sorted(folder.glob("pytorch_model*.bin"))
        if not paths:
            raise FileNotFoundError(f"init.source={folder}: no *.safetensors and no pytorch_model*.bin; copy the weights there")
        for path in paths:
            yield from ((name, value.float()) for name, value in torch.load(path, "cpu", weights_only=True).items())
