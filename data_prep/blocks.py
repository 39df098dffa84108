"""Turn one bucket of documents into block shards, in one folder per source and split."""

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_prep import encode
from data_prep.buckets import Bucket, slice_of
from data_prep.config import CorpusConfig
from data_prep.read import FILE
from data_prep.split import held_out_draw
from modernenc.data.blocks import VALIDATION
from modernenc.data.mds import Block, Writer
from modernenc.data.tokenizer import Tokenizer, load_tokenizer


class BlockWriter:
    """Cut a stream of documents into blocks of `block_tokens` tokens, and write them as shards.

    The folder gets its name when it is complete. `counts` has the number of documents, tokens, blocks, and cuts (blocks whose
    last document continues in the next block).
    """

    def __init__(self, folder: Path, block_tokens: int, dtype: str, shard_mb: int) -> None:
        self.folder = folder
        self.block_tokens = block_tokens
        self.dtype = dtype
        self.counts: Counter[str] = Counter(documents=0, tokens=0, blocks=0, cuts=0)
        self._unfinished = folder.with_name(folder.name + ".tmp")
        for leftover in (folder, self._unfinished):
            shutil.rmtree(leftover, ignore_errors=True)
        self._writer = Writer(self._unfinished, dtype, shard_mb << 20)
        self._tokens = np.empty(block_tokens, dtype=dtype)
        self._filled = 0
        self._ends: list[int] = []

    def add(self, tokens: np.ndarray) -> None:
        """Add one document; it may fill the rest of a block and continue in the next ones."""
        self.counts["documents"] += 1
        self.counts["tokens"] += len(tokens)
        while len(tokens):
            taken = min(len(tokens), self.block_tokens - self._filled)
            self._tokens[self._filled : self._filled + taken] = tokens[:taken]
            self._filled += taken
            self._ends.append(self._filled)
            tokens = tokens[taken:]
            if self._filled == self.block_tokens:
                self._flush(continues=len(tokens) > 0)

    def close(self) -> None:
        """Write the rest as a shorter block, and give the folder its final name."""
        if self._filled:
            self._flush(continues=False)
        self._writer.finish()
        os.replace(self._unfinished, self.folder)

    def _flush(self, continues: bool) -> None:
        ends = np.array(self._ends, dtype=np.uint32)
        self._writer.write(Block(self._tokens[: self._filled], ends, continues))
        self.counts["blocks"] += 1
        self.counts["cuts"] += continues
        self._filled = 0
        self._ends = []


class WriteBlocks(PipelineStep):
    """A datatrove step whose task r turns bucket r into the folders `<source>/<split>/bucket-<r>/`.

    `thresholds` gives for each source the draw below which a document is held out. The task also writes two files to the work
    folder. `counts/<r>.json` has the counts of each folder, the size of each source's text, and by file the documents of which
    the tokenizer left no token; `counts/<r>.npz` has the number of occurrences of each token in each folder.
    """

    type = "💽 - WRITER"
    name = "Write blocks"

    def __init__(self, corpus: CorpusConfig, root: Path, work: Path, thresholds: dict[str, float], vocab_size: int) -> None:
        super().__init__()
        self.corpus = corpus
        self.root = root
        self.work = work
        self.thresholds = thresholds
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write one bucket."""
        bucket = Bucket(self.work / "buckets" / f"{rank:05d}", list(self.thresholds), self.corpus.seed)
        writers: dict[str, BlockWriter] = {}
        unigrams: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(self.vocab_size, dtype=np.int64))
        texts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        empty: defaultdict[str, Counter[str]] = defaultdict(Counter)
        tokenizer = load_tokenizer(self.work / "tokenizer.json")
        for document, tokens in self._encoded(bucket, tokenizer):
            source = document.metadata["source"]
            if not len(tokens):
                empty[source][document.metadata[FILE]] += 1
                continue
            texts[source].update(_text_size(document.text, encode.normalized(tokenizer, document.text)))
            folder = f"{source}/{self._split_of(document)}"
            if folder not in writers:
                path = self.root / folder / f"bucket-{rank:05d}"
                writers[folder] = BlockWriter(path, self.corpus.block_tokens, self.dtype, self.corpus.shard_mb)
            writers[folder].add(tokens)
            unigrams[folder] += np.bincount(tokens, minlength=self.vocab_size)
        for writer in writers.values():
            writer.close()
        (self.work / "counts").mkdir(exist_ok=True)
        np.savez(self.work / "counts" / f"{rank:05d}.npz", **cast(Any, unigrams))
        folders = {folder: writer.counts for folder, writer in writers.items()}
        report = json.dumps({"folders": folders, "texts": texts, "empty": empty})
        (self.work / "counts" / f"{rank:05d}.json").write_text(report)
        yield from data or ()  # datatrove runs a step by exhausting its generator

    def _split_of(self, document: Document) -> str:
        if held_out_draw(document) < self.thresholds[document.metadata["source"]]:
            return VALIDATION
        return slice_of(document, self.corpus.slices, self.corpus.seed)

    def _encoded(self, bucket: Bucket, tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray]]:
        """Yield each document of the bucket with its tokens."""
        documents = iter(bucket)
        for texts in encode.batches(document.text for document in bucket):
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                yield next(documents), np.array(encoding.ids, dtype=self.dtype)


def token_dtype(vocab_size: int) -> str:
    """Return the smallest type that can hold every token id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _text_size(text: str, normal: str) -> dict[str, int]:
    """Count the bytes and words of a normalised text, and the characters of the original and how many of them changed."""
    return {
        "bytes": len(normal.encode()),
        "words": len(normal.split()),
        "characters": len(text),
        "changed_characters": encode.changed_characters(text, normal),
    }
