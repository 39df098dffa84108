"""Dataclasses that cannot be changed once they are made, and that OmegaConf still composes."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

Class = TypeVar("Class")

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Callable[[Class], Class]:
        """Stand in for the mark that type checkers read, which Python 3.10 lacks."""
        return lambda decorator: decorator


@dataclass_transform(frozen_default=True)
def frozen(schema: type[Class]) -> type[Class]:
    """Turn a class into a frozen dataclass; `dataclasses.replace` returns a changed copy of an instance.

    `dataclass(frozen=True)` would not do: OmegaConf makes the nodes of such a class read-only, and so refuses every override.
    """

    def set_once(self: Any, name: str, value: Any) -> None:
        if name in vars(self):
            raise FrozenInstanceError(f"{type(self).__name__}.{name} cannot be changed: make a copy by dataclasses.replace")
        object.__setattr__(self, name, value)

    decorated = dataclass(schema)
    decorated.__setattr__ = set_once  # pyright: ignore[reportAttributeAccessIssue]
    return decorated
