"""The typed schema of a corpus to prepare. Its YAMLs are `conf/corpus/*.yaml`."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Source:
    """Where one source's documents come from."""

    reader: Any = MISSING
    """`_target_`: a reader of `data_prep.readers` or `data_prep.environment`, or any of datatrove's, and its arguments."""
    filters: list[Any] = field(default_factory=list)
    """`_target_`: datatrove filters, in order; what they drop is counted with their reason."""
    limit_mb: float = 0
    """Stop after this many million characters; 0 reads all."""
    licence: str = ""
    """Licence of the texts; goes into the manifest, and must be given."""
    license: str = ""
    """Another spelling of `licence`."""
    url: str = MISSING
    """Where the texts come from; goes into the manifest."""


@dataclass
class Roles:
    """Special tokens of a given tokenizer by what they are for, such as `<bos>`; empty stands for the usual names."""

    cls: str = ""
    sep: str = ""
    pad: str = ""
    mask: str = ""
    unk: str = ""


@dataclass
class Tokenizer:
    """Which ids the text becomes."""

    file: str = ""
    """A `tokenizer.json` to use; empty trains a byte-level BPE on the corpus."""
    vocab_size: int = 0
    """Entries of a trained tokenizer, special tokens included; 0 with a given file."""
    train_mb: float = 0
    """Million characters to train on, taken evenly from the shuffled documents; 0 with a given file."""
    roles: Roles = field(default_factory=Roles)


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
    """Text tokens in a block; 0 takes 4,096 to 32,768, so that the smallest source has some hundred blocks."""
    shard_mb: int = 64
    """Size limit of a shard in MiB."""
    slices: int = 1
    """Random shares that each source is cut into, so that phases can take disjoint ones."""
    validation_error: float = MISSING
    """Standard error, in nats, that each source's validation loss is to have: as much text is held out as that takes."""
    validation_share: float = MISSING
    """Share of a source's documents, in (0, 1), that are held out at most; a source too small for `validation_error` has this
    share held out, and one document at least. Documents are taken by their hash."""
    max_dropped: float = MISSING
    """Share of a source's documents, in [0, 1], that may be of no use (broken lines, bytes that are not UTF-8, no text) before
    preparing stops. What filters drop and duplicates do not count."""
    buckets: int = MISSING
    """Shuffle buckets; one bucket's text must fit in memory."""
    workers: int = MISSING
    """Processes at a time; may change when preparing is stopped and started again."""
    seed: int = 17
    """Seed of the shuffle and of the slices."""


def register() -> None:
    """Make the schema known to Hydra."""
    ConfigStore.instance().store(name="corpus_schema", node=Corpus)
