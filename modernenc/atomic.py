"""Files that are written whole or not at all: under another name beside the target first, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL_SUFFIX = ".tmp"
"""Suffix of files that are still being written; a killed process may leave some behind."""


def partial_path(path: Path) -> Path:
    """Return the path under which this process writes a file before it renames it to `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path under which to write a file that then replaces `path`; what was written goes if that fails.

    An OSError names the file, which the system does not when a write fails.
    """
    try:
        yield partial_path(path)
        os.replace(partial_path(path), path)
    except BaseException as error:
        with suppress(OSError):
            partial_path(path).unlink()
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all, and sync it and its folder to disk."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: Any) -> None:
    """Write a small JSON file, whole or not at all, and sync it and its folder to disk."""
    write_text(path, json.dumps(content, indent=1))
