"""Held-out documents by source: those of a corpus that data_prep wrote, or of files with text."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard
from tokenizers import Tokenizer

from modernenc.data.blocks import MANIFEST, VALIDATION, Corpus
from modernenc.data.store import Store

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
HELD_OUT = ("val", "dev", "test", "held")
"""How the name of a file begins that is not for training."""


def read_documents(root: Path, characters: int) -> dict[str, list[str]]:
    """Return documents of each source, up to this many characters of each.

    `root` is a corpus, whose held-out documents are decoded; a file; or a folder with files anywhere in it, of which only
    `val*`, `dev*`, `test*` and `held*` count where there are any. The source of a document is its `source`, or else the name
    of its folder or file. Raises FileNotFoundError or ValueError, naming the file and the line, for what is no text.
    """
    found: dict[str, list[str]] = {}
    left: dict[str, int] = {}
    for source, text in _of_corpus(root, characters) if (root / MANIFEST).is_file() else _of_files(root):
        if text.strip() and left.setdefault(source, characters) > 0:
            found.setdefault(source, []).append(text)
            left[source] -= len(text)
    if not found:
        raise ValueError(f"--data {root}: no text in it")
    return found


def _of_corpus(root: Path, characters: int) -> Iterator[tuple[str, str]]:
    corpus = Corpus(Store(str(root)))
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    for source in corpus.sources:
        taken = 0
        for document in corpus.open(f"{source}/{VALIDATION}").documents():
            text = tokenizer.decode(document.tolist())
            yield source, text
            taken += len(text)
            if taken > characters:
                break


def _of_files(root: Path) -> Iterator[tuple[str, str]]:
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.name.endswith(ENDINGS))
    held_out = [path for path in files if path.name.startswith(HELD_OUT)]
    if not files:
        raise FileNotFoundError(f"--data {root}: neither a corpus ({MANIFEST}) nor a file of text ({', '.join(ENDINGS)})")
    for path in held_out or files:
        name = path.parent.name if path.name.startswith(HELD_OUT) else path.name.partition(".")[0]
        if path.suffix == ".txt":
            yield name, path.read_text(encoding="utf-8")
        else:
            for row in _rows(path):
                yield str(row.get("source", name)), row["text"]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise ValueError(f'{path}, line {number}: expected an object with a "text"')
                yield row
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".zst":
        return zstandard.open(path, "rt", encoding="utf-8")
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
