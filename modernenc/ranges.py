"""Check values against the types and ranges that are annotated beside a field of a dataclass or an argument of a function.

`Annotated[int, Ge(1)]` is a number with a range, in the terms of the library `annotated-types`, and
`Annotated[str, Literal["ddp", "fsdp"]]` one of several words.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Len, Lt, MaxLen, MinLen, MultipleOf

_NUMBERS = {int: "a whole number", float: "a number"}


def check(key: str, kind: Any, value: Any) -> None:
    """Raise ValueError for the first value that is of another type or out of its range, naming its dotted key.

    `kind` is the annotation of the value; a dataclass is checked field by field, a mapping and a list value by value. Numbers
    must lie between -2^63 and 2^63. `X | None` is checked unless it is None.
    """
    if get_origin(kind) is Annotated:
        kind, *constraints = get_args(kind)
        check(key, kind, value)
        expected = [(text, holds) for constraint in constraints for text, holds in _conditions(constraint)]
        if not all(holds(value) for _, holds in expected):
            raise ValueError(f"{key}={value}: expected {' and '.join(text for text, _ in expected)}")
    elif is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        for one in fields(kind):
            check(f"{key}.{one.name}" if key else one.name, hints[one.name], getattr(value, one.name))
    elif get_origin(kind) is UnionType:
        if value is not None:
            check(key, get_args(kind)[0], value)
    elif get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{key}={value}: expected a mapping")
        for name, item in value.items():
            check(f"{key}.{name}", get_args(kind)[1], item)
    elif get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{key}={value}: expected a list")
        for number, item in enumerate(value):
            check(f"{key}[{number}]", get_args(kind)[0], item)
    elif kind in _NUMBERS:
        fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if not (fits and abs(value) < 1 << 63):  # what a machine word holds; NaN is less than nothing
            finite = fits and abs(value) < math.inf
            raise ValueError(f"{key}={value}: expected {_NUMBERS[kind]}{' below 2^63' if finite else ''}")
    elif kind in (bool, str) and not isinstance(value, kind):
        raise ValueError(f"{key}={value}: expected {'true or false' if kind is bool else 'text'}")


def _conditions(constraint: Any) -> Iterator[tuple[str, Callable[[Any], bool]]]:
    """Yield each condition of a constraint in words, and as a function."""
    match constraint:
        case Ge(ge=least):
            yield f"{least} or more", lambda value: value >= least
        case Gt(gt=bound):
            yield f"more than {bound}", lambda value: value > bound
        case Le(le=most):
            yield f"{most} or less", lambda value: value <= most
        case Lt(lt=bound):
            yield f"less than {bound}", lambda value: value < bound
        case MultipleOf(multiple_of=1):
            yield "a whole number", lambda value: value == int(value)
        case MultipleOf(multiple_of=unit):
            yield f"a multiple of {unit}", lambda value: value % unit == 0
        case MinLen(min_length=length):
            yield f"{length} values or more", lambda value: len(value) >= length
        case MaxLen(max_length=length):
            yield f"{length} values or fewer", lambda value: len(value) <= length
        case Interval(gt=None, ge=least, lt=None, le=most) if least is not None and most is not None:
            yield f"{least} to {most}", lambda value: least <= value <= most
        case Len(min_length=length, max_length=most) if length == most:
            yield f"{length} values", lambda value: len(value) == length
        case GroupedMetadata():
            for part in constraint:
                yield from _conditions(part)
        case _ if get_origin(constraint) is Literal:
            words = get_args(constraint)
            yield f"one of {', '.join(str(word) or 'nothing' for word in words)}", lambda value: value in words
        case _:
            raise TypeError(f"{constraint}: no constraint that can be checked")
