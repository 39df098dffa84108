"""A reader of text in MDS shards that other programs wrote; it needs MosaicML streaming, the extra `[streaming]`."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.readers.base import BaseDiskReader


class MdsReader(BaseDiskReader):
    """Read one document per sample from each folder that has an `index.json`; the text is in the column `text_key`.

    Shards are copied to a temporary folder and unpacked there, because streaming's own dataset class deletes raw shards whose
    index names compressed ones (mosaicml/streaming#330). Columns that contain pickles are refused. Raises ValueError when
    streaming is not installed.
    """

    name = "📦 MDS"

    def __init__(self, data_folder: str, **settings: Any) -> None:
        super().__init__(data_folder, **settings)
        if not find_spec("streaming"):
            raise ValueError("shards of other programs need MosaicML streaming: pip install 'modernenc[streaming]'")

    def read_file(self, filepath: str) -> Iterator[Document]:
        """Yield the documents of the folder of one index, numbered from 1."""
        samples = enumerate(self._samples(filepath), 1)
        yield from filter(None, (self.get_document_from_dict(sample, filepath, number) for number, sample in samples))

    def _samples(self, filepath: str) -> Iterator[dict[str, Any]]:
        from streaming.base.format import reader_from_json  # pyright: ignore[reportMissingImports]  # an extra

        with self.data_folder.open(filepath, "rb") as file:
            index = json.load(file)
        for entry in index["shards"]:
            with TemporaryDirectory() as folder:
                (Path(folder) / "shard").write_bytes(self._raw_content(PurePosixPath(filepath).parent, entry))
                raw = {**entry["raw_data"], "basename": "shard"}
                shard: Any = reader_from_json(folder, None, {**entry, "raw_data": raw, "zip_data": None, "compression": None})
                shard.validate(allow_unsafe_types=False)
                for place in range(entry["samples"]):
                    yield dict(shard[place])

    def _raw_content(self, folder: PurePosixPath, entry: dict[str, Any]) -> bytes:
        """Return the raw content of a shard from its raw or its compressed file, whichever exists."""
        from streaming.base.compression import decompress  # pyright: ignore[reportMissingImports]  # an extra

        raw, packed = entry["raw_data"]["basename"], (entry["zip_data"] or {}).get("basename", "")
        for name in (raw, packed):
            if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
                raise ValueError(f"its index names a file outside its folder, {name}")
        whole = self.data_folder.exists(str(folder / raw))
        with self.data_folder.open(str(folder / (raw if whole else packed)), "rb") as file:
            return file.read() if whole else decompress(entry["compression"], file.read())
