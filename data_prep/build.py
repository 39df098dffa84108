"""Prepare a corpus: list and look at the inputs, read, survey, train the tokenizer, write blocks, merge, verify.

Preparation can be interrupted at any moment and started again: datatrove skips the tasks that are done, folders get their
name when they are complete, and the manifest is written last: only a folder with a manifest is a corpus.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from omegaconf import OmegaConf
from rich.console import Console

from data_prep import encode
from data_prep.account import Account
from data_prep.blocks import WriteBlocks
from data_prep.config import CorpusConfig
from data_prep.inputs import Inputs, inputs_of, reader_of
from data_prep.manifest import manifest_of, tables
from data_prep.read import Read
from data_prep.split import Survey, SurveyBucket, held_out_draw, surveys
from data_prep.verify import verify
from modernenc.data.blocks import MANIFEST
from modernenc.data.tokenizer import Tokenizer, load_tokenizer, role_ids, vocabulary_size
from modernenc.evaluation.standard_error import tokens_for
from modernenc.run_folder.tables import ALL

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
"""Valid names of a source, since it is the name of a folder and a key of mixes."""
_WORK = ".work"
_MEASURED_BYTES = 1 << 18
"""Size of the sample of each source on which its bytes per token are measured."""
_WANTED_BLOCKS, _MIN_BLOCK_TOKENS, _MAX_BLOCK_TOKENS = 512, 4_096, 32_768
_MUCH_CHANGED = 0.01
"""Fraction of characters that a given tokenizer may change without a warning."""


def build(corpus: CorpusConfig) -> None:
    """Prepare the folder `corpus.out`, or continue unfinished work there; a finished corpus is left as it is.

    Raises ValueError or FileNotFoundError, naming the key or the file, when a source cannot be read, or when `out` contains
    something else.
    """
    check(corpus)
    root = Path(corpus.out)
    inputs = {name: inputs_of(name, reader_of(name, source)) for name, source in corpus.sources.items()}
    fingerprint = _fingerprint(corpus, inputs)
    if (root / MANIFEST).is_file():
        if json.loads((root / MANIFEST).read_text()).get("fingerprint") == fingerprint:
            print(f"{root} is up to date")
            return
        raise ValueError(
            f"out={root} holds a corpus made from other inputs or settings; choose another out, or delete that folder"
        )
    readings = [
        Read(name, source, [file.path for file in inputs[name].files], root / _WORK, number, corpus.buckets)
        for number, (name, source) in enumerate(corpus.sources.items())
    ]
    _look(corpus, readings)
    work = _work_folder(root, fingerprint)
    console = Console(stderr=True)
    with console.status("") as status:
        accounts = {}
        for reading in readings:
            status.update(f"read {reading.source} ({len(reading.files):,} files)")
            accounts[reading.source] = _read(reading, inputs[reading.source].parts, corpus, work)
        status.update("survey")
        found = _survey(corpus, work)
        status.update("train the tokenizer" if not corpus.tokenizer.file else "take the given tokenizer")
        tokenizer = _tokenizer(corpus, work, found)
        status.update("tokenize, shuffle and write blocks")
        _write(corpus, root, work, tokenizer, found)
        status.update("merge and verify")
        shutil.copyfile(work / "tokenizer.json", root / "tokenizer.json")
        passed_over = {name: entry.passed_over for name, entry in inputs.items()}
        manifest = manifest_of(corpus, root, work, tokenizer, fingerprint, accounts, found, passed_over)
    # From here on the folder is a corpus, unless the check of every block finds a fault.
    unfinished = root / f"{MANIFEST}.tmp"
    unfinished.write_text(json.dumps(manifest, indent=1))
    os.replace(unfinished, root / MANIFEST)
    try:
        verify(root)
    except (ValueError, FileNotFoundError):
        (root / MANIFEST).unlink()
        raise
    shutil.rmtree(work)  # kept until now, so that preparation could be continued
    for table in tables(manifest):
        console.print(table)
    print(f"{root} is ready")


def check(corpus: CorpusConfig) -> None:
    """Raise ValueError, naming the key, for a setting that is out of range or missing."""

    def require(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            raise ValueError(f"{key}={value}: expected {expected}")

    require(0 < corpus.validation_share < 1, "validation_share", corpus.validation_share, "a fraction in (0, 1)")
    require(corpus.validation_error > 0, "validation_error", corpus.validation_error, "a number of nats above 0, such as 0.02")
    require(0 <= corpus.max_dropped <= 1, "max_dropped", corpus.max_dropped, "a fraction in [0, 1]")
    for key in ("slices", "buckets", "workers", "shard_mb"):
        require(getattr(corpus, key) > 0, key, getattr(corpus, key), "1 or more")
    require(
        corpus.block_tokens >= 0, "block_tokens", corpus.block_tokens, "1 or more, or 0 to choose by the size of the corpus"
    )
    require(bool(corpus.sources), "sources", {}, "at least one source")
    for name, source in corpus.sources.items():
        require(bool(NAME.fullmatch(name)) and name != ALL, "sources", name,
                f"names of letters, digits, _, - and ., which begin with a letter or digit and are not {ALL}")  # fmt: skip
        require(bool(source.licence) != bool(source.license), f"sources.{name}.licence", source.licence or source.license,
                f"the licence of the texts, given once: sources.{name}.licence=CC-BY-4.0, or unknown")  # fmt: skip
        require(source.limit_mb >= 0, f"sources.{name}.limit_mb", source.limit_mb, "a number above 0, or 0 to read all")
    trained = not corpus.tokenizer.file
    require(not trained or corpus.tokenizer.vocab_size > 261, "tokenizer.vocab_size", corpus.tokenizer.vocab_size,
            "more than 261 (bytes and special tokens), or tokenizer.file=PATH")  # fmt: skip
    require(not trained or corpus.tokenizer.train_mb > 0, "tokenizer.train_mb", corpus.tokenizer.train_mb, "more than 0")
    if not trained:
        role_ids(encode.load_given(Path(corpus.tokenizer.file)), vars(corpus.tokenizer.roles))


def _look(corpus: CorpusConfig, readings: list[Read]) -> None:
    """Read the first documents of each source, before the long work; raises ValueError when a source has none.

    A warning says when a given tokenizer changes many of their characters.
    """
    for reading in readings:
        texts = reading.peek()
        if corpus.tokenizer.file:
            tokenizer = encode.load_given(Path(corpus.tokenizer.file))
            changed = sum(encode.changed_characters(text, encode.normalized(tokenizer, text)) for text in texts)
            fraction = changed / sum(map(len, texts))
            if fraction > _MUCH_CHANGED:
                log.warning("sources.%s: tokenizer.file changes %.0f %% of its characters before encoding: the model sees "
                            "the changed text only", reading.source, 100 * fraction)  # fmt: skip


def _fingerprint(corpus: CorpusConfig, inputs: dict[str, Inputs]) -> str:
    """Hash all that decides what the corpus contains: the settings, the input files, and a given tokenizer."""
    settings = OmegaConf.to_container(OmegaConf.structured(corpus), resolve=True)
    assert isinstance(settings, dict)
    for key in ("out", "workers", "max_dropped"):  # these do not change the result
        settings.pop(key)
    files = {name: entry.files for name, entry in inputs.items()}
    content = hashlib.sha256(json.dumps([settings, files], sort_keys=True).encode())
    if corpus.tokenizer.file:
        content.update(Path(corpus.tokenizer.file).read_bytes())
    return content.hexdigest()


def _work_folder(root: Path, fingerprint: str) -> Path:
    """Return the folder of unfinished work, emptied when the work was on other inputs or settings.

    Raises ValueError when `root` contains files that are not of this work, since nothing else is ever deleted there.
    """
    work = root / _WORK
    mark = work / "fingerprint"
    others = sorted(path.name for path in root.iterdir() if path != work) if root.exists() else []
    if not (mark.is_file() and mark.read_text() == fingerprint):
        if others:
            whose = "blocks of unfinished work on other inputs or settings" if work.exists() else "other files"
            raise ValueError(f"out={root} holds {whose} ({', '.join(others[:5])}); choose a new folder, or delete that one")
        if work.exists():
            log.warning("%s holds unfinished work on other inputs or settings; starting over", work)
            shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    mark.write_text(fingerprint)
    return work


def _run(step: Any, tasks: int, workers: int, logs: Path) -> None:
    # With several processes the tokenizer's own threads would only compete for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if min(tasks, workers) == 1 else "false"
    LocalPipelineExecutor([step], tasks=tasks, workers=min(tasks, workers), logging_dir=str(logs)).run()


def _read(reading: Read, parts: int, corpus: CorpusConfig, work: Path) -> Account:
    """Read a source, and return its account; raises ValueError when too many of its documents are unusable."""
    _run(reading, parts, corpus.workers, work / "logs" / f"read-{reading.number:03d}")
    account = Account()
    for path in sorted((work / "accounts" / f"{reading.number:03d}").glob("*.json")):
        account.add(Account.load(path))
    account.check_faults(reading.source, corpus.max_dropped)
    return account


def _survey(corpus: CorpusConfig, work: Path) -> dict[str, Survey]:
    tokens = tokens_for(corpus.validation_error)
    step = SurveyBucket(corpus, work, tokens)
    _run(step, corpus.buckets, corpus.workers, work / "logs" / "survey")
    return surveys(work, list(corpus.sources), corpus.validation_share)


def _tokenizer(corpus: CorpusConfig, work: Path, found: dict[str, Survey]) -> Tokenizer:
    path = work / "tokenizer.json"
    if not path.is_file():
        if corpus.tokenizer.file:
            made = encode.load_given(Path(corpus.tokenizer.file))
        else:
            made = encode.train(_sample(corpus, work, found), corpus.tokenizer.vocab_size)
        encode.save(made, path)
    # Always the saved file: the tokenizer is the same whether or not the preparation was interrupted.
    tokenizer = load_tokenizer(path)
    role_ids(tokenizer, vars(corpus.tokenizer.roles))
    entries = vocabulary_size(tokenizer)
    if not corpus.tokenizer.file and entries < corpus.tokenizer.vocab_size:
        log.warning("tokenizer.vocab_size=%d: the text has enough different pairs for %d entries only, which is the size of "
                    "the vocabulary now", corpus.tokenizer.vocab_size, entries)  # fmt: skip
    return tokenizer


def _sample(corpus: CorpusConfig, work: Path, found: dict[str, Survey]) -> Iterator[str]:
    """Yield the texts to train the tokenizer on: equally much from each source and bucket, and none that may be held out."""
    for number, name in enumerate(corpus.sources):
        files = sorted((work / "buckets").glob(f"*/{number:03d}-*.jsonl.zst"))
        for file in files:
            # There is one file per bucket and part of the reading: all parts of a source contribute equally.
            left = corpus.tokenizer.train_mb * 1e6 / len(corpus.sources) / len(files)
            for document in _trained_on(file, found[name]):
                if left <= 0:
                    break
                left -= len(document.text)
                yield document.text


def _bytes_per_token(corpus: CorpusConfig, work: Path, tokenizer: Tokenizer, found: dict[str, Survey]) -> dict[str, float]:
    """Measure the bytes per token of each source on a sample of its training text; 1.0 where it certainly has none."""
    measured = {}
    for number, name in enumerate(corpus.sources):
        size = tokens = 0
        for file in sorted((work / "buckets").glob(f"*/{number:03d}-*.jsonl.zst")):
            for document in _trained_on(file, found[name]):
                if size > _MEASURED_BYTES:
                    break
                size += len(document.text.encode())
                tokens += len(tokenizer.encode(document.text, add_special_tokens=False).ids)
        measured[name] = size / max(1, tokens) or 1.0
    return measured


def _trained_on(file: Path, survey: Survey) -> Iterator[Document]:
    """Yield the documents of a bucket's file that are never held out."""
    first = survey.first_trained()
    for document in JsonlReader(str(file.parent)).read_file(file.name):
        if held_out_draw(document) >= first:
            yield document


def block_size(tokens: float) -> int:
    """Return the block size for a source of `tokens` tokens: the largest power of two that gives it at least
    `_WANTED_BLOCKS` blocks.

    Blocks have `_MIN_BLOCK_TOKENS` to `_MAX_BLOCK_TOKENS` tokens, so a small source has fewer of them.
    """
    size = _MAX_BLOCK_TOKENS
    while size > _MIN_BLOCK_TOKENS and tokens < _WANTED_BLOCKS * size:
        size //= 2
    return size


def _write(corpus: CorpusConfig, root: Path, work: Path, tokenizer: Tokenizer, found: dict[str, Survey]) -> None:
    """Write the blocks of all buckets, after choosing what to hold out and, where it is 0, `corpus.block_tokens`."""
    wanted, sizes = tokens_for(corpus.validation_error), _bytes_per_token(corpus, work, tokenizer, found)
    smallest = min(found[name].bytes / sizes[name] for name in corpus.sources)
    # Each lane needs a block of each slice, so the smallest source decides.
    corpus.block_tokens = corpus.block_tokens or block_size(smallest)
    thresholds = {name: found[name].threshold(name, corpus.slices, wanted, sizes[name]) for name in corpus.sources}
    step = WriteBlocks(corpus, root.resolve(), work.resolve(), thresholds, vocabulary_size(tokenizer))
    _run(step, corpus.buckets, corpus.workers, work / "logs" / "write")
