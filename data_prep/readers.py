"""Readers of JSON lines, Parquet and plain text that pass nothing over in silence.

datatrove's own readers leave out broken lines and the rest of a file after a byte that is not UTF-8, with a word in a log.
These hand every line or row to the adapter, where `data_prep.read` counts it: one that cannot be read as `{FAULT: reason}`.
A file that cannot be read to its end raises.
"""

import bz2
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Generator, Iterator
from typing import IO, Any, cast

import orjson
import pyarrow
from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader
from pyarrow import parquet

FAULT = "\0fault"
"""Key of a row that says why it cannot be used."""
NOT_UTF8 = "not UTF-8"
_BOM = b"\xef\xbb\xbf"
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_OPENERS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    # zstandard's own stream ends without a word where a file was cut, and after the first of several frames.
    ".zst": lambda raw: io.BufferedReader(cast(Any, pyarrow.CompressedInputStream(raw, "zstd"))),
}
COMPRESSED = tuple(_OPENERS)
"""Endings of compressed files that are read."""


def open_bytes(folder: DataFolder, path: str) -> IO[bytes]:
    """A file of bytes, decompressed by its ending; reading one that was cut raises."""
    raw = folder.open(path, "rb")
    ending = next((ending for ending in COMPRESSED if path.endswith(ending)), "")
    return _OPENERS[ending](raw) if ending else raw


class JsonLines(JsonlReader):
    """One document per line, a JSON object with the key `text_key`; blank lines are no documents."""

    def read_file(self, filepath: str) -> Generator[Document, None, None]:
        """The documents of one file; lines are numbered from 1."""
        with open_bytes(self.data_folder, filepath) as file:
            for number, line in enumerate(file, 1):
                line = (line.removeprefix(_BOM) if number == 1 else line).strip()
                document = self.get_document_from_dict(_json_object(line), filepath, number) if line else None
                if document:
                    yield document


class ParquetRows(ParquetReader):
    """One document per row, with its text in the column `text_key`."""

    def read_file(self, filepath: str) -> Generator[Document, None, None]:
        """The documents of one file; rows are numbered from 1."""
        number = 0
        with self.data_folder.open(filepath, "rb") as file, parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=self.batch_size):
                for row in _rows(batch):
                    number += 1
                    document = self.get_document_from_dict(row, filepath, number)
                    if document:
                        yield document


class TextReader(BaseDiskReader):
    """Plain text in UTF-8: one document per file, per line, or per paragraph (where blank lines separate documents).

    ValueError when `document` is none of file, line and paragraph.
    """

    name = "📄 Text"

    def __init__(self, data_folder: str, document: str = "file", **settings: Any) -> None:
        super().__init__(data_folder, **settings)
        if document not in ("file", "line", "paragraph"):
            raise ValueError(f"document={document}: expected file, line or paragraph")
        self.document = document

    def read_file(self, filepath: str) -> Iterator[Document]:
        """The documents of one file, numbered from 1."""
        with open_bytes(self.data_folder, filepath) as file:
            for number, row in enumerate(self._rows(file), 1):
                document = self.get_document_from_dict(row, filepath, number)
                if document:
                    yield document

    def _rows(self, file: IO[bytes]) -> Iterator[dict[str, Any]]:
        if self.document == "line":
            lines = (line.rstrip(b"\r\n") for line in file)
            yield from (self._row(line.removeprefix(_BOM)) for line in lines if line.strip())
            return
        row = self._row(file.read().removeprefix(_BOM))
        if self.document == "file" or FAULT in row:
            yield row
            return
        paragraphs = _BLANK_LINES.split(row[self.text_key].replace("\r\n", "\n"))
        yield from ({self.text_key: paragraph.strip("\n")} for paragraph in paragraphs if paragraph.strip())

    def _row(self, content: bytes) -> dict[str, Any]:
        try:
            return {self.text_key: content.decode()}
        except UnicodeDecodeError:
            return {FAULT: NOT_UTF8}


def _json_object(line: bytes) -> dict[str, Any]:
    """The object of a line, or the fault that it has."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            row = json.loads(line.decode())  # which takes NaN, huge numbers and lone surrogates too
        except UnicodeDecodeError:
            return {FAULT: NOT_UTF8}
        except (ValueError, RecursionError):
            return {FAULT: "not JSON"}
    return row if isinstance(row, dict) else {FAULT: "not a JSON object"}


def _rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of a batch; one whose bytes are not UTF-8 does not take the others with it."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError:
                yield {FAULT: NOT_UTF8}
