"""The second pass of the shuffle: a bucket holds documents with certain text hashes, and orders them by a second hash.

The hash of a text alone decides which bucket it goes to, what is a duplicate, which slice a document belongs to, and the
order. So the result does not depend on how the reading was divided, and duplicates always meet in one bucket.
`data_prep.split` decides by the same hash what is held out.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import xxhash
from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader

from data_prep.read import FILE


class Bucket:
    """The documents of one bucket without exact duplicates, in shuffled order.

    Of several equal documents the one in the first source, and there in the first file, is kept. `duplicates` counts the
    others by source and file.
    """

    def __init__(self, folder: Path, sources: list[str], seed: int) -> None:
        reader = JsonlReader(str(folder))
        found: dict[str, Document] = {}
        self.duplicates: dict[str, Counter[str]] = {source: Counter() for source in sources}
        for number, source in enumerate(sources):
            # The file names sort by source, then by the part of the reading: the order in which documents are kept.
            for path in sorted(folder.glob(f"{number:03d}-*.jsonl.zst"), key=lambda path: path.name):
                for document in reader.read_file(path.name):
                    if document.metadata["hash"] in found:
                        self.duplicates[source][document.metadata[FILE]] += 1
                    else:
                        found[document.metadata["hash"]] = document
        self._documents = sorted(found.values(), key=lambda document: draw(document, f"order {seed}"))

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents in the order of the seed."""
        return iter(self._documents)


def slice_of(document: Document, slices: int, seed: int) -> str:
    """Return the slice, `slice-NNN`, of a document that is not held out."""
    return f"slice-{int(draw(document, f'slice {seed}') * slices):03d}"


def draw(document: Document, purpose: str) -> float:
    """Return a number in [0, 1) that depends only on the document's text and on the purpose."""
    return xxhash.xxh3_64_intdigest((document.metadata["hash"] + purpose).encode()) / 2**64
