"""The typed schema of a corpus to prepare. Its YAMLs are `conf/corpus/*.yaml`."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class SourceConfig:
    """Where the documents of one source come from."""

    reader: Any = MISSING
    """The reader and its arguments. Its `_target_` is a reader of `data_prep.readers`, `data_prep.environment` or
    `data_prep.foreign`, or any reader of datatrove."""
    filters: list[Any] = field(default_factory=list)
    """datatrove filters, each by its `_target_` and arguments, applied in order. Documents that they drop are counted with the
    filter's reason."""
    limit_mb: float = 0
    """Stop reading after this many million characters; 0 reads all."""
    licence: str = ""
    """Licence of the texts, which the manifest records. Required."""
    license: str = ""
    """Another spelling of `licence`."""
    url: str = MISSING
    """Where the texts come from; the manifest records it."""


@dataclass
class RolesConfig:
    """Names of the special tokens in a given tokenizer, by role, such as `<bos>` for cls. Empty means the usual names."""

    cls: str = ""
    sep: str = ""
    pad: str = ""
    mask: str = ""
    unk: str = ""


@dataclass
class TokenizerConfig:
    """The tokenizer: either trained on the corpus, or given as a file."""

    file: str = ""
    """Path of a `tokenizer.json` to use. Empty trains a byte-level BPE on the corpus."""
    vocab_size: int = 0
    """Number of entries of a trained tokenizer, including special tokens; 0 with a given file."""
    train_mb: float = 0
    """Million characters to train on, taken evenly from all sources and buckets; 0 with a given file."""
    roles: RolesConfig = field(default_factory=RolesConfig)


@dataclass
class CorpusConfig:
    """A corpus to prepare, and the folder of block shards that it becomes."""

    name: str = MISSING
    """Name of the corpus; set by `+corpus=NAME`."""
    out: str = MISSING
    """Folder to write."""
    input: str = ""
    """Folder to read from, where the YAML of the corpus refers to ${input}."""
    sources: dict[str, SourceConfig] = MISSING
    """The sources by name. A document that occurs more than once is kept in the first source that contains it."""
    licences: list[str] = field(default_factory=list)
    """The licences that sources may have, spelled as there; a source with another one is refused before anything is read. None
    allows all."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    block_tokens: int = MISSING
    """Text tokens in a block. 0 chooses 4,096 to 32,768, so that the smallest source has a few hundred blocks."""
    shard_mb: int = 64
    """Size limit of a shard, in MiB."""
    slices: int = 1
    """Number of random slices into which each source is cut, so that phases can use disjoint ones."""
    validation_error: float = MISSING
    """Standard error, in nats, that the validation loss of each source should have; it sets how much text is held out."""
    validation_share: float = MISSING
    """Largest fraction of a source's documents to hold out, in (0, 1). A source too small for `validation_error` has this
    fraction held out, and at least one document. Documents are chosen by their hash."""
    max_dropped: float = MISSING
    """Largest fraction of a source's documents, in [0, 1], that may be unusable (broken lines, bytes that are not UTF-8, no
    text) before preparation stops. Duplicates, and documents that filters drop, do not count."""
    buckets: int = MISSING
    """Number of shuffle buckets. The text of one bucket must fit into memory."""
    workers: int = MISSING
    """Number of parallel processes; it may change when preparation is interrupted and started again."""
    seed: int = 17
    """Seed of the shuffle and of the slices."""


def register() -> None:
    """Register the schema with Hydra."""
    ConfigStore.instance().store(name="corpus_schema", node=CorpusConfig)
