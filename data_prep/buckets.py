"""The two passes of the shuffle: documents are dealt to buckets by the hash of their text, then each bucket is ordered by hash.

The hash alone decides what is a duplicate, what is held out, the slice, and the order; so the result does not depend on how the
reading was shared out, and a duplicate always meets its twin.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader

VALIDATION = "validation"


class Cap(PipelineStep):
    """Stop a task after its share of `limit_mb` million characters."""

    type = "✂ - LIMIT"
    name = "Cap"

    def __init__(self, limit_mb: float) -> None:
        super().__init__()
        self.limit_mb = limit_mb

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Pass documents on until the share is used up."""
        left = self.limit_mb * 1e6 / world_size
        for document in data:
            if left <= 0:
                return
            left -= len(document.text)
            yield document


class Deal(PipelineStep):
    """Give each document its hash and its bucket; drop empty ones."""

    type = "🃏 - DEAL"
    name = "Deal"

    def __init__(self, source: str, buckets: int) -> None:
        super().__init__()
        self.source = source
        self.buckets = buckets

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Pass on the documents that hold text."""
        for document in data:
            if not document.text.strip():
                self.stat_update("dropped_empty")
                continue
            number = xxhash.xxh3_128_intdigest(document.text.encode("utf-8", "surrogatepass"))
            yield Document(
                text=document.text.encode("utf-8", "ignore").decode(),
                id=document.id,
                metadata={"hash": f"{number:032x}", "bucket": f"{number % self.buckets:05d}", "source": self.source},
            )


class Bucket:
    """The documents of one bucket: exact duplicates dropped, in shuffled order."""

    def __init__(self, folder: Path, sources: list[str], seed: int) -> None:
        reader = JsonlReader(str(folder))
        found: dict[str, Document] = {}
        self.duplicates: Counter[str] = Counter()
        for source in sources:
            for path in sorted(folder.glob(f"{source}-*.jsonl.zst"), key=lambda path: path.name):
                for document in reader.read_file(path.name):
                    if document.metadata["hash"] in found:
                        self.duplicates[source] += 1
                    else:
                        found[document.metadata["hash"]] = document
        self._documents = sorted(found.values(), key=lambda document: _draw(document, f"order {seed}"))

    def __iter__(self) -> Iterator[Document]:
        """The documents, shuffled by the seed."""
        return iter(self._documents)


def split_of(document: Document, validation_share: float, slices: int, seed: int) -> str:
    """`validation` or `slice-NNN`: where a document goes."""
    # The seed is left out, so that a document is held out in every preparation.
    if _draw(document, "validation") < validation_share:
        return VALIDATION
    return f"slice-{int(_draw(document, f'slice {seed}') * slices):03d}"


def _draw(document: Document, purpose: str) -> float:
    """A number in [0, 1) that depends on the document's text and on what it is for."""
    return xxhash.xxh3_64_intdigest(document.metadata["hash"] + purpose) / 2**64
