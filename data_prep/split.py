"""The second pass over the documents: deduplicate and order each bucket, and decide which documents are held out.

The hash of a text alone decides which bucket it goes to, what is a duplicate, which slice a document belongs to, the order, and
what is held out. So the result does not depend on how the reading was divided, and duplicates always meet in one bucket.

Of each source the documents with the lowest draws are held out, as much text as validation needs:

1. A survey of each bucket lists the candidates: the documents whose draw is below `validation_share`, or the one with the
   lowest draw if there is none. The tokenizer is not trained on candidates.
2. Once the bytes per token of a source are known, its candidates are held out in the order of their draws until they have
   enough tokens for `validation_error`. The other candidates become training text.

The draw does not depend on the seed: a document is held out in every preparation that holds out at least as much text.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader

from data_prep.account import add_up, load_parts, save_part
from data_prep.config import CorpusConfig
from data_prep.read import FILE
from modernenc.data.blocks import VALIDATION
from modernenc.evaluation.standard_error import tokens_for

_MARGIN = 1.05
"""Factor on the text to hold out, since bytes per token are measured on a sample only."""
_MAX_BYTES_PER_TOKEN = 16
"""Upper bound of the average over a source, for any language and tokenizer."""
Entry = tuple[float, int, str]
"""Draw of a document, its size in bytes, and the slice that it joins if it is not held out."""


def draw(document: Document, purpose: str) -> float:
    """Return a number in [0, 1) that depends only on the document's text and on the purpose."""
    return xxhash.xxh3_64_intdigest((document.metadata["hash"] + purpose).encode()) / 2**64


def held_out_draw(document: Document) -> float:
    """Return the number in [0, 1) that decides whether a document is held out."""
    return draw(document, VALIDATION)


def slice_of(document: Document, slices: int, seed: int) -> str:
    """Return the slice, `slice-NNN`, of a document that is not held out."""
    return f"slice-{int(draw(document, f'slice {seed}') * slices):03d}"


def load_bucket(folder: Path, sources: Iterable[str], seed: int) -> tuple[list[Document], dict[str, Counter[str]]]:
    """Return the distinct documents of a bucket in the order of the seed, and the number of duplicates by source and file.

    Of several equal documents the one in the first source, and there in the first file, is kept.
    """
    reader = JsonlReader(str(folder))
    found: dict[str, Document] = {}
    duplicates: dict[str, Counter[str]] = {source: Counter() for source in sources}
    # By source, then by the part of the reading: the order in which documents are kept.
    for path in sorted(folder.glob("*.jsonl.zst"), key=lambda path: (int(path.name.partition("-")[0]), path.name)):
        for document in reader.read_file(path.name):
            metadata = document.metadata
            if found.setdefault(metadata["hash"], document) is not document:
                duplicates[metadata["source"]][metadata[FILE]] += 1
    return sorted(found.values(), key=lambda document: draw(document, f"order {seed}")), duplicates


@dataclass
class Survey:
    """What is known of one source after deduplication: what it holds by file, and the documents that may be held out."""

    kept: Counter[str] = field(default_factory=Counter)
    """Number of documents kept from each file."""
    duplicates: Counter[str] = field(default_factory=Counter)
    """Number of duplicates dropped from each file."""
    bytes: int = 0
    """Size of all documents that are kept."""
    slices: Counter[str] = field(default_factory=Counter)
    """Number of documents in each slice, without candidates."""
    candidates: list[Any] = field(default_factory=list)
    """The candidates, each an `Entry`; in the order of their draws when the surveys of all buckets are added up."""

    def keep_candidates(self, share: float) -> None:
        """Keep as candidates only the documents drawn below `share`, or the lowest one when there is none."""
        self.candidates.sort()
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


def survey_bucket(corpus: CorpusConfig, work: Path, data: object = None, rank: int = 0, world_size: int = 1) -> None:
    """Write the survey of bucket `rank` to the folder `surveys` of the work folder.

    A huge bucket does not list more candidates than would suffice if all other buckets had none.
    """
    enough = tokens_for(corpus.validation_error) * _MAX_BYTES_PER_TOKEN
    documents, duplicates = load_bucket(work / "buckets" / f"{rank:05d}", corpus.sources, corpus.seed)
    surveys = {name: Survey(duplicates=duplicates[name]) for name in corpus.sources}
    entries: dict[str, list[Entry]] = {name: [] for name in corpus.sources}
    for document in documents:
        survey, size = surveys[document.metadata["source"]], len(document.text.encode())
        survey.kept[document.metadata[FILE]] += 1
        survey.bytes += size
        entry = held_out_draw(document), size, slice_of(document, corpus.slices, corpus.seed)
        entries[document.metadata["source"]].append(entry)
    for name, survey in surveys.items():
        ordered, most, size = sorted(entries[name]), 1, 0
        while most < len(ordered) and ordered[most][0] < corpus.validation_share and size < enough:
            size += ordered[most][1]
            most += 1
        survey.candidates = ordered[:most]
        survey.slices.update(slice_name for _, _, slice_name in ordered[most:])
    save_part(work / "surveys", rank, {name: vars(survey) for name, survey in surveys.items()})


def load_surveys(work: Path, share: float) -> dict[str, Survey]:
    """Return the survey of each source, added up over all buckets, with candidates drawn below `share`."""
    surveys = {name: Survey(**counts) for name, counts in add_up(load_parts(work / "surveys")).items()}
    for survey in surveys.values():
        survey.keep_candidates(share)
    return surveys
