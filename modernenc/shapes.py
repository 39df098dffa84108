"""Annotations of shapes and ranges, for code that also runs where jaxtyping and annotated-types are not installed.

An exported MEGA carries its code along (`modernenc.hugging_face.remote_code`); there they have no effect.
"""

from typing import Annotated, Any

try:
    from annotated_types import Ge, Gt, Interval, MultipleOf
    from jaxtyping import Bool, Float, Int
except ImportError:

    class _Any:
        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Bool = Float = Int = _Any
    Ge = Gt = Interval = MultipleOf = lambda *bounds, **more_bounds: None

Count = Annotated[int, Ge(1)]
Depth = Annotated[int, Interval(ge=1, le=1_000)]
Even = Annotated[int, Ge(2), MultipleOf(2)]
Positive = Annotated[float, Gt(0)]
DropoutRate = Annotated[float, Interval(ge=0, lt=1)]

__all__ = ["Bool", "Count", "Depth", "DropoutRate", "Even", "Float", "Int", "Positive"]
