"""The validation split: of each source the documents with the lowest draws, as much text as validation needs.

1. A survey of each bucket lists the candidates: the documents whose draw is below `validation_share`, or the one with the
   lowest draw if there is none. The tokenizer is not trained on candidates.
2. Once the bytes per token of a source are known, its candidates are held out in the order of their draws until they have
   enough tokens for `validation_error`. The other candidates become training text.

The draw does not depend on the seed: a document is held out in every preparation that holds out at least as much text.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_prep.buckets import Bucket, draw, slice_of
from data_prep.config import CorpusConfig
from data_prep.read import FILE
from modernenc.data.blocks import VALIDATION

_MARGIN = 1.05
"""Factor on the text to hold out, since bytes per token are measured on a sample only."""
_MAX_BYTES_PER_TOKEN = 16
"""Upper bound of the average over a source, for any language and tokenizer."""


def held_out_draw(document: Document) -> float:
    """Return the number in [0, 1) that decides whether a document is held out."""
    return draw(document, VALIDATION)


@dataclass
class Survey:
    """The documents of one source after deduplication, and which of them may be held out."""

    kept: Counter[str] = field(default_factory=Counter)
    """Number of documents kept from each file."""
    duplicates: Counter[str] = field(default_factory=Counter)
    """Number of duplicates dropped from each file."""
    bytes: int = 0
    """Size of all documents that are kept."""
    slices: Counter[str] = field(default_factory=Counter)
    """Number of documents in each slice, without candidates."""
    candidates: list[Any] = field(default_factory=list)
    """The candidates in the order of their draws: (draw, bytes, the slice it joins if it is not held out)."""

    def add(self, other: "Survey") -> None:
        """Add the documents of the source in another bucket."""
        self.kept.update(other.kept)
        self.duplicates.update(other.duplicates)
        self.bytes += other.bytes
        self.slices.update(other.slices)
        self.candidates = sorted([*self.candidates, *other.candidates])

    def keep_candidates(self, share: float) -> None:
        """Keep as candidates only the documents drawn below `share`, or the lowest one when there is none."""
        most = max(1, sum(entry[0] < share for entry in self.candidates))
        self.slices.update(name for _, _, name in self.candidates[most:])
        del self.candidates[most:]

    def first_trained(self) -> float:
        """Return the draw at and above which no document is ever held out, so that its text is training text."""
        return self.candidates[-1][0] + 2.0**-52 if self.candidates else 0.0

    def threshold(self, source: str, slices: int, tokens: float, bytes_per_token: float) -> float:
        """Return the draw below which documents are held out, for about `tokens` tokens.

        Raises ValueError when a slice would have no document.
        """
        if self.kept.total() < 2:
            raise ValueError(
                f"sources.{source} has {self.kept.total()} document, and one is held out for validation; add documents, "
                "or cut its file into several (document=line or document=paragraph of data_prep.readers.TextReader)"
            )
        most = len(self.candidates) - (not self.slices)  # at least one document remains to train on
        held_out, size = 0, 0
        while held_out < most and (size < _MARGIN * tokens * bytes_per_token or not held_out):
            size += self.candidates[held_out][1]
            held_out += 1
        left = self.slices + Counter(name for _, _, name in self.candidates[held_out:])
        empty = [name for name in (f"slice-{number:03d}" for number in range(slices)) if not left[name]]
        if empty:
            raise ValueError(
                f"sources.{source}: no document fell into {empty[0]}; it has {self.kept.total():,} documents, too few for "
                f"slices={slices}; use fewer slices"
            )
        return self.candidates[held_out][0] if held_out < len(self.candidates) else self.first_trained()


class SurveyBucket(PipelineStep):
    """A datatrove step whose task r writes the survey of bucket r to `<work>/surveys/<r>.json`.

    `tokens` is how many tokens of each source validation needs.
    """

    type = "📊 - STATS"
    name = "Survey"

    def __init__(self, corpus: CorpusConfig, work: Path, tokens: float) -> None:
        super().__init__()
        self.corpus = corpus
        self.work = work
        self.tokens = tokens

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Survey one bucket."""
        slices, seed = self.corpus.slices, self.corpus.seed
        bucket = Bucket(self.work / "buckets" / f"{rank:05d}", list(self.corpus.sources), seed)
        surveys = {name: Survey(duplicates=bucket.duplicates[name]) for name in self.corpus.sources}
        documents: dict[str, list[tuple[float, int, str]]] = {name: [] for name in self.corpus.sources}
        for document in bucket:
            name = document.metadata["source"]
            surveys[name].kept[document.metadata[FILE]] += 1
            entry = held_out_draw(document), len(document.text.encode()), slice_of(document, slices, seed)
            surveys[name].bytes += entry[1]
            documents[name].append(entry)
        for name, entries in documents.items():
            entries.sort()
            most = self._most_candidates(entries)
            surveys[name].candidates = entries[:most]
            surveys[name].slices.update(entry[2] for entry in entries[most:])
        folder = self.work / "surveys"
        folder.mkdir(exist_ok=True)
        content = json.dumps({name: vars(survey) for name, survey in surveys.items()})
        (folder / f"{rank:05d}.json").write_text(content)
        yield from data or ()  # datatrove runs a step by exhausting its generator

    def _most_candidates(self, entries: list[tuple[float, int, str]]) -> int:
        """Return how many of the bucket's documents, in the order of their draws, are candidates.

        A huge bucket need not list more than would suffice if all other buckets had none.
        """
        most, size = min(1, len(entries)), 0
        share, enough = self.corpus.validation_share, self.tokens * _MAX_BYTES_PER_TOKEN
        while most < len(entries) and entries[most][0] < share and size < enough:
            size += entries[most][1]
            most += 1
        return most


def surveys(work: Path, sources: list[str], share: float) -> dict[str, Survey]:
    """Return the survey of each source, added up over all buckets."""
    total = {name: Survey() for name in sources}
    for path in sorted((work / "surveys").glob("*.json")):
        for name, saved in json.loads(path.read_text()).items():
            counts = {key: Counter(saved[key]) for key in ("kept", "duplicates", "slices")}
            total[name].add(Survey(**counts, bytes=saved["bytes"], candidates=saved["candidates"]))
    for survey in total.values():
        survey.keep_candidates(share)
    return total
