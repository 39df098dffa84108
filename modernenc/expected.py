"""Check a JSON file against an expected shape, so that a damaged file is one clear message and not an error deep in the code.

A shape looks like the value itself: `str`, `bool`, `float` or a range of integers stands for a scalar, a list of one shape for
a list of any length, a dictionary for the keys that must exist (or, if `str` is its only key, for a dictionary with any keys).
A key that ends with `?` may be missing.
"""

import json
import math
from typing import Any

NUMBER = range(1 << 53)
"""The shape of a count: an integer from 0 up to the largest that every JSON reader represents exactly."""


def parse(content: bytes, shape: Any, name: str, remedy: str) -> Any:
    """Return the value of a JSON file.

    Raises ValueError when it is not JSON of the given shape; the message gives the file's `name`, the place in it, what was
    found there, and `remedy`.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ValueError(f"{name} is not a JSON file: {error}; {remedy}") from error
    if fault := _fault(value, shape, ""):
        raise ValueError(f"{name}: {fault}; {remedy}")
    return value


def _fault(value: Any, shape: Any, place: str) -> str:
    """Describe the first mismatch between value and shape; empty when there is none."""
    parts: list[tuple[str, Any, Any]] = []
    if isinstance(shape, dict):
        fits, expected = isinstance(value, dict), "a dictionary"
        for named in (shape if str not in shape else value) if fits else ():
            key = named.removesuffix("?") if str not in shape else named
            at = f"{place}.{key}" if place else key
            if key in value:
                parts.append((at, value[key], shape.get(named, shape.get(str))))
            elif key == named:
                return f"no {at}"
    elif isinstance(shape, list):
        fits, expected = isinstance(value, list), "a list"
        parts = [(f"{place}[{at}]", item, shape[0]) for at, item in enumerate(value)] if fits else []
    elif isinstance(shape, range):  # `type`, since a bool is an int too
        fits, expected = type(value) is int and value in shape, f"an integer from {shape.start} to {shape.stop - 1}"
    elif shape is float:
        fits, expected = type(value) in (int, float) and abs(value) < math.inf, "a number"
    elif shape is bool:
        fits, expected = isinstance(value, bool), "true or false"
    else:
        fits, expected = isinstance(value, str), "text"
    if not fits:
        found = {dict: "a dictionary", list: "a list"}.get(type(value)) or json.dumps(value)
        return f"{place or 'the content'} is {found if len(found) < 40 else found[:40] + '...'}, expected {expected}"
    return next(filter(None, (_fault(part, inner, at) for at, part, inner in parts)), "")
