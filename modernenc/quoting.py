"""Quote the values of KEY=VALUE arguments for Hydra, whose grammar knows no é, # or second = in an unquoted value."""

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

_FLAGS_WITH_A_VALUE = (
    "--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p", "--experimental-rerun",
)  # fmt: skip
_MEANT_FOR_HYDRA = re.compile(r"[\[{'\"]|\w+\(")
"""Beginning of a list, a dict, a quoted string or a function."""


def quote_values(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a Hydra program with quotes around the values that it could not parse without them.

    Values that it can parse stay unchanged; a mapping gets the `+` that lets it bring new keys. Raises ValueError for an
    argument that quotes cannot repair, or that has several meanings: a list, a dict, a sweep.
    """
    parser = OverridesParser.create()
    sweeps = bool({"--multirun", "-m"} & set(arguments))
    before = ["", *arguments]
    return [
        argument if argument.startswith("-") or "=" not in argument or flag in _FLAGS_WITH_A_VALUE
        else _with_new_keys(parser, argument) if _parses(parser, argument) else _quote_value(parser, argument, sweeps)
        for flag, argument in zip(before, arguments, strict=False)
    ]  # fmt: skip


def parse_assignments(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield keys and values by the same grammar without Hydra; the value of a sweep is taken as text."""
    parser = OverridesParser.create()
    for argument in quote_values(arguments):
        if "=" not in argument or argument.startswith("~"):
            raise ValueError(f"{argument}: expected KEY=VALUE")
        override = parser.parse_overrides([argument])[0]
        value = argument.partition("=")[2] if override.is_sweep_override() else override.value()
        yield override.key_or_group, value


def _with_new_keys(parser: OverridesParser, argument: str) -> str:
    """Return a mapping as one that may bring keys, such as names of variables, and anything else as it is."""
    override = parser.parse_overrides([argument])[0]
    is_mapping = not override.is_sweep_override() and isinstance(override.value(), dict)
    return f"+{argument}" if is_mapping and not argument.startswith(("+", "~")) else argument


def _parses(parser: OverridesParser, argument: str) -> bool:
    try:
        parser.parse_overrides([argument])
    except HydraException:
        return False
    return True


def _quote_value(parser: OverridesParser, argument: str, sweeps: bool) -> str:
    key, _, value = argument.partition("=")
    if not _parses(parser, f"{key}=0"):
        raise ValueError(f"{argument}: {key} is no key; expected KEY=VALUE, +KEY=VALUE or ~KEY")
    as_text = shlex.quote(f"{key}={_quote(value)}")
    if _MEANT_FOR_HYDRA.match(value):
        raise ValueError(
            f"{argument}: the value begins like a list, a dict, a quoted text or a function, and is none; mend it, or, to give "
            f"it as plain text, write {as_text}"
        )
    if sweeps and "," in value:
        each = shlex.quote(f"{key}={','.join(_quote(part) for part in value.split(','))}")
        raise ValueError(f"{argument}: one value, or, with --multirun, several? write {as_text} or {each}")
    return f"{key}={_quote(value, Quote.single)}"


def _quote(value: str, quote: Quote = Quote.double) -> str:
    return QuotedString(value, quote).with_quotes()
