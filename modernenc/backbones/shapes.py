"""Shapes in signatures, as jaxtyping has them; without it, as where an exported model is loaded, they say nothing."""

from typing import Any

try:
    from jaxtyping import Bool, Float, Int
except ImportError:

    class _Any:
        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Bool = Float = Int = _Any

__all__ = ["Bool", "Float", "Int"]
