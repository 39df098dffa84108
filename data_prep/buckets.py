"""The second pass of the shuffle: documents were dealt to buckets by the hash of their text; each bucket is ordered by hash.

The hash alone decides what is a duplicate, which slice a document belongs to, and the order; so the result does not depend on
how the reading was shared out, and a duplicate always meets its twin. `data_prep.split` decides by it what is held out.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import xxhash
from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader

from data_prep.read import FILE


class Bucket:
    """The documents of one bucket: exact duplicates dropped, in shuffled order.

    `duplicates` counts those of each source and file; what a later source or file repeats is the duplicate.
    """

    def __init__(self, folder: Path, sources: list[str], seed: int) -> None:
        reader = JsonlReader(str(folder))
        found: dict[str, Document] = {}
        self.duplicates: dict[str, Counter[str]] = {source: Counter() for source in sources}
        for number, source in enumerate(sources):
            for path in sorted(folder.glob(f"{number:03d}-*.jsonl.zst"), key=lambda path: path.name):
                for document in reader.read_file(path.name):
                    if document.metadata["hash"] in found:
                        self.duplicates[source][document.metadata[FILE]] += 1
                    else:
                        found[document.metadata["hash"]] = document
        self._documents = sorted(found.values(), key=lambda document: draw(document, f"order {seed}"))

    def __iter__(self) -> Iterator[Document]:
        """The documents, shuffled by the seed."""
        return iter(self._documents)


def slice_of(document: Document, slices: int, seed: int) -> str:
    """`slice-NNN`: where a document goes that is not held out."""
    return f"slice-{int(draw(document, f'slice {seed}') * slices):03d}"


def draw(document: Document, purpose: str) -> float:
    """A number in [0, 1) that depends on the document's text and on what it is for."""
    return xxhash.xxh3_64_intdigest((document.metadata["hash"] + purpose).encode()) / 2**64
