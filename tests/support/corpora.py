"""Corpora to prepare from invented text, and what is stored in them."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from tokenizers import Tokenizer

from data_prep.config import CorpusConfig, SourceConfig, TokenizerConfig
from modernenc.data.blocks import Corpus as Opened
from modernenc.data.store import Store

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "mix", "quartz"]


def texts(count: int, seed: int) -> list[str]:
    """Return texts of 1 to 119 words, a few of them alike."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=int(rng.integers(1, 120)))) for _ in range(count)]


def write_jsonl(path: Path, documents: list[str]) -> None:
    """Write documents as JSON lines, compressed as the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    content = lines.encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)


def jsonl(folder: Path, **settings: Any) -> SourceConfig:
    """Return a source that reads the JSON lines of a folder."""
    reader = {"_target_": "datatrove.pipeline.readers.JsonlReader", "data_folder": str(folder)}
    return SourceConfig(reader=reader, licence="CC0-1.0", url="https://example.org", **settings)


def corpus(out: Path, sources: dict[str, SourceConfig], **settings: Any) -> CorpusConfig:
    """Return the settings of a small corpus, to be prepared in this process."""
    defaults: dict[str, Any] = dict(
        name="test", tokenizer=TokenizerConfig(vocab_size=300, train_mb=1), block_tokens=64, validation_error=0.02,
        validation_share=0.1, max_dropped=0.01, buckets=3, workers=1,
    )  # fmt: skip
    return CorpusConfig(out=str(out), sources=sources, **{**defaults, **settings})


def stored(root: Path) -> dict[str, list[str]]:
    """Return the documents of each folder of a corpus, joined from its blocks and decoded."""
    opened = Opened(Store(str(root)))
    tokenizer = Tokenizer.from_file(str(opened.tokenizer_file))
    found: dict[str, list[str]] = {}
    for source, entry in opened.sources.items():
        for split in [*entry["slices"], "validation"]:
            shards = opened.open(f"{source}/{split}")
            documents, open_document = [], []
            for shard, size in enumerate(shards.sizes):
                for index in range(size):
                    block = shards.read(shard, index)
                    start = 0
                    for end in block.ends.tolist():
                        open_document += block.tokens[start:end].tolist()
                        if not (block.continues and end == block.ends[-1]):
                            documents.append(tokenizer.decode(open_document))
                            open_document = []
                        start = end
            assert not open_document
            found[f"{source}/{split}"] = documents
    return found
