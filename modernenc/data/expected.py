"""Check a JSON file against an expected shape, so that a damaged file is one clear message and not an error deep in the code.

A shape looks like the value itself: `str`, `float` or a range of integers stands for a scalar, a list of one shape for a list
of any length, a dictionary for the keys that must exist (or, if `str` is its only key, for a dictionary with any keys).
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
    fault = _fault(value, shape, "")
    if fault:
        raise ValueError(f"{name}: {fault}; {remedy}")
    return value


def _fault(value: Any, shape: Any, place: str) -> str:
    """Describe the first mismatch between value and shape; empty when there is none."""
    if isinstance(shape, range):
        if isinstance(value, bool) or not isinstance(value, int) or value not in shape:
            return _mismatch(value, place, f"an integer from {shape.start} to {shape.stop - 1}")
    elif shape is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return _mismatch(value, place, "a number")
    elif shape is str:
        if not isinstance(value, str):
            return _mismatch(value, place, "text")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return _mismatch(value, place, "a list")
        for at, item in enumerate(value):
            if found := _fault(item, shape[0], f"{place}[{at}]"):
                return found
    else:
        if not isinstance(value, dict):
            return _mismatch(value, place, "a dictionary")
        named = shape if str not in shape else dict.fromkeys(value, shape[str])
        for key, inner in named.items():
            at = f"{place}.{key}" if place else key
            if key not in value:
                return f"no {at}"
            if found := _fault(value[key], inner, at):
                return found
    return ""


def _mismatch(value: Any, place: str, expected: str) -> str:
    found = {dict: "a dictionary", list: "a list"}.get(type(value)) or json.dumps(value)
    return f"{place or 'the content'} is {found if len(found) < 40 else found[:40] + '...'}, expected {expected}"
