"""The shape annotations of jaxtyping, for code that also runs where jaxtyping is not installed.

An exported MEGA carries its code along (`modernenc.hugging_face.remote_code`); without jaxtyping the shapes are ignored.
"""

from typing import Any

try:
    from jaxtyping import Bool, Float, Int
except ImportError:

    class _Any:
        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Bool = Float = Int = _Any

__all__ = ["Bool", "Float", "Int"]
