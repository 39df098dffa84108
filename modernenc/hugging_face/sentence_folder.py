"""Make an exported folder one of sentence-transformers too: it then also says how a text becomes one vector."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from modernenc.installed import check_installed

_SHARED = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "README.md",
)
"""Files of sentence-transformers' folder that the exported one has already, with the head of masked LM."""


def add_pooling(folder: Path, pooling: Any, normalize: bool, max_length: int) -> Any:
    """Add sentence-transformers' files to a folder, and return the model that it loads from there.

    `pooling` is the mean over tokens or the first one, and `normalize` divides the vector by its length. Raises ValueError
    if the package is missing.
    """
    check_installed("retrieval")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    encoder: Any = Transformer(str(folder), max_seq_length=max_length)
    modules = [encoder, Pooling(encoder.get_embedding_dimension(), pooling), *([Normalize()] if normalize else [])]
    with tempfile.TemporaryDirectory() as scratch:
        SentenceTransformer(modules=modules).save(scratch, create_model_card=False)
        for path in Path(scratch).iterdir():
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            elif path.name not in _SHARED and path.suffix != ".py":
                shutil.copyfile(path, folder / path.name)
    return SentenceTransformer(str(folder))
