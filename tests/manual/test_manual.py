"""The manual says what the code is: configuration keys, terms, error messages."""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from support.commands import ROOT

DOCS = ROOT / "docs"
SOURCES = [path for package in ("modernenc", "data_prep") for path in sorted((ROOT / package).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}
TERMS = re.findall(r"^- \*\*(.+?)\*\*(?: \((.*?)\))?: ", (DOCS / "glossary.md").read_text(), re.M)
HEADINGS = re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.M)


def test_the_reference_of_configuration_keys_is_up_to_date():
    result = subprocess.run(
        [sys.executable, "docs/reference.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_each_term_is_defined_once():
    assert len(TERMS) > 40
    assert [term for term, number in Counter(term for term, _ in TERMS).items() if number > 1] == []


def test_each_name_in_the_glossary_is_in_the_code():
    kinds = (ast.ClassDef, ast.FunctionDef)
    known = {node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, kinds)}
    keys = re.findall(r"^(?:- |\| )`([\w.]+)`", (DOCS / "configuration.md").read_text(), re.M)
    known |= {*keys, *(key.rpartition(".")[2] for key in keys)}
    named = {name for _, names in TERMS for name in re.findall(r"`(.*?)`", names)}
    assert sorted(named - known) == []


def test_no_two_classes_have_one_name():
    """Backbones are excepted: each has its embeddings, layers and head in a file of its own."""
    trees = [tree for path, tree in TREES.items() if "backbones" not in str(path)]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, number in names.items() if number > 1 and not name.startswith("_")] == []


@pytest.mark.parametrize("heading", HEADINGS)
def test_each_error_message_of_the_troubleshooting_is_in_the_code(heading):
    """Parts of a message between its ellipses must occur in one string, in this order."""
    parts = [re.escape(part) for part in heading.split("…") if part.strip(" :=;.")]
    assert parts and any(re.search(".*".join(parts), text) for text in strings())


@cache
def strings() -> list[str]:
    """Return each string of the code as one line, with an ellipsis for each value filled in."""
    found = []
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                values = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%\w", "…", node.value))
    return [" ".join(text.split()) for text in found]


def test_every_page_is_in_the_navigation():
    pages = set(re.findall(r'"(\w+\.md)"', (DOCS / "zensical.toml").read_text()))
    assert pages == {path.name for path in Path(DOCS).glob("*.md")}
