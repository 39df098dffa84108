"""What a JSON file must hold for us to read it: one clear line where it does not, in place of an error within.

A shape is written as the value would be: `str`, `float` or a range of whole numbers for a value, a list of one shape for any
number of them, a dictionary for the keys that must be there (or, with `str` as its only key, for any keys).
"""

import json
import math
from typing import Any

NUMBER = range(1 << 53)
"""A count: a whole number from 0 to what JSON can say exactly."""


def parse(content: bytes, shape: Any, name: str, remedy: str) -> Any:
    """The value that a file holds; ValueError names the file, the place in it, what is there and what to do."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, or nested without an end
        raise ValueError(f"{name} is no JSON file: {error}; {remedy}") from error
    fault = _fault(value, shape, "")
    if fault:
        raise ValueError(f"{name}: {fault}; {remedy}")
    return value


def _fault(value: Any, shape: Any, place: str) -> str:
    """What is first found wrong; empty when nothing is."""
    if isinstance(shape, range):
        if isinstance(value, bool) or not isinstance(value, int) or value not in shape:
            return _not(value, place, f"a whole number from {shape.start} to {shape.stop - 1}")
    elif shape is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return _not(value, place, "a number")
    elif shape is str:
        if not isinstance(value, str):
            return _not(value, place, "text")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return _not(value, place, "a list")
        return next((found for at, item in enumerate(value) if (found := _fault(item, shape[0], f"{place}[{at}]"))), "")
    else:
        if not isinstance(value, dict):
            return _not(value, place, "a dictionary")
        named = shape if str not in shape else dict.fromkeys(value, shape[str])
        for key, inner in named.items():
            at = f"{place}.{key}" if place else key
            if key not in value:
                return f"no {at}"
            if found := _fault(value[key], inner, at):
                return found
    return ""


def _not(value: Any, place: str, expected: str) -> str:
    said = {dict: "a dictionary", list: "a list"}.get(type(value)) or json.dumps(value)
    return f"{place or 'it'} is {said if len(said) < 40 else said[:40] + '...'}, expected {expected}"
