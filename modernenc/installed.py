"""Whether the packages of an extra are installed."""

from importlib.util import find_spec
from pathlib import Path

PACKAGES = {
    "evaluate": ("accelerate", "datasets", "scipy", "seqeval", "sklearn"),
    "retrieval": ("bm25s", "pytrec_eval", "sentence_transformers/sentence_transformer"),
    "colbert": ("bm25s", "pylate", "pytrec_eval"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
}
"""Folders of packages, by extra. The folder inside sentence-transformers is that of the versions that this code is for."""


def check_installed(extra: str) -> None:
    """Raise ValueError if a package of an extra is missing."""
    missing = [name for name in PACKAGES[extra] if not is_there(name)]
    if missing:
        name = missing[0].partition("/")[0].replace("_", "-")
        is_old = "/" in missing[0] and find_spec(name.replace("-", "_"))
        reason = "too old, as PyLate holds it back; in another environment" if is_old else "not installed"
        raise ValueError(f"{name} is {reason}: pip install 'modernenc[{extra}]'")


def is_there(name: str) -> bool:
    """Return whether a package, or a folder of it, is installed."""
    package, _, folder = name.partition("/")
    spec = find_spec(package)
    return spec is not None and all((Path(place) / folder).is_dir() for place in spec.submodule_search_locations or ())
