"""The typed schema of a corpus to prepare. Its YAMLs are `conf/corpus/*.yaml`."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Source:
    """Where one source's documents come from."""

    reader: Any = MISSING
    """`_target_`: a datatrove reader, `data_prep.text.TextReader` or one of `data_prep.environment`, and its arguments."""
    filters: list[Any] = field(default_factory=list)
    """`_target_`: datatrove filters, in order; what they drop is counted with their reason."""
    limit_mb: float = 0
    """Stop after this many million characters; 0 reads all."""
    licence: str = MISSING
    """Licence of the texts; goes into the manifest."""
    url: str = MISSING
    """Where the texts come from; goes into the manifest."""


@dataclass
class Tokenizer:
    """Which ids the text becomes."""

    file: str = ""
    """A `tokenizer.json` to use; empty trains a byte-level BPE on the corpus."""
    vocab_size: int = 0
    """Entries of a trained tokenizer, special tokens included; 0 with a given file."""
    train_mb: float = 0
    """Million characters to train on, taken evenly from the shuffled documents; 0 with a given file."""
    roles: dict[str, str] = field(default_factory=dict)
    """Special tokens of a given file by role (cls, sep, pad, mask, unk) where their names are not the usual ones."""


@dataclass
class Corpus:
    """A corpus and the folder of block shards to make of it."""

    name: str = MISSING
    """Name of the corpus; set by `+corpus=NAME`."""
    out: str = MISSING
    """Folder to write."""
    input: str = ""
    """Folder to read from, where the corpus's YAML says ${input}."""
    sources: dict[str, Source] = MISSING
    """The sources. A document that occurs twice stays in the first source that has it."""
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    block_tokens: int = MISSING
    """Text tokens in a block."""
    shard_mb: int = 64
    """Size limit of a shard in MiB."""
    slices: int = 1
    """Random shares that each source is cut into, so that phases can take disjoint ones."""
    validation_share: float = MISSING
    """Share of the documents held out, in (0, 1), by hash: a document is held out whatever the rest of the corpus is."""
    buckets: int = MISSING
    """Shuffle buckets; one bucket's text must fit in memory."""
    tasks: int = MISSING
    """Tasks per source when reading."""
    workers: int = MISSING
    """Processes at a time."""
    seed: int = 17
    """Seed of the shuffle and of the slices."""


def register() -> None:
    """Make the schema known to Hydra."""
    ConfigStore.instance().store(name="corpus_schema", node=Corpus)
