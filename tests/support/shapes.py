"""Checks of the shapes and dtypes in signatures: they cost nothing in use, so only tests make them."""

from pathlib import Path

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

MODULES = [
    "modernenc.backbones",
    "modernenc.objectives",
    "modernenc.data.batch",
    "modernenc.data.packing",
    "modernenc.data.masking",
]
MODULES += [
    f"modernenc.kernels.{path.stem}"
    for path in (Path(__file__).parents[2] / "modernenc" / "kernels").glob("*.py")
    if not path.stem.endswith("_triton")  # Triton reads the functions of these as they are written
]
"""Modules and packages whose signatures are checked."""
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""The checker of types; it takes an int for a float, as PEP 484 does."""


def check_shapes() -> None:
    """Have every later import of one of `MODULES` check its signatures at each call."""
    install_import_hook(MODULES, "support.shapes.checked")
