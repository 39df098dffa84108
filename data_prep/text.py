"""A reader for folders of plain text, the one form that datatrove has no reader for."""

from collections.abc import Iterator

from datatrove.data import Document
from datatrove.pipeline.readers.base import BaseDiskReader


class TextReader(BaseDiskReader):
    """One document per file; compressed files (.gz, .zst) are read too."""

    name = "📄 Text"

    def read_file(self, filepath: str) -> Iterator[Document]:
        """The document of one file."""
        with self.data_folder.open(filepath, "r", compression="infer") as file:
            document = self.get_document_from_dict({"text": file.read()}, filepath, 0)
        if document:
            yield document
