"""Prepare a corpus: look at the inputs, read, survey, split, train the tokenizer, write blocks, merge, verify, manifest.

Every step can be cut short: datatrove skips the tasks that are done, folders get their name when they are whole, and the
manifest, written last, is what makes the corpus one.
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
from data_prep.config import Corpus
from data_prep.inputs import Inputs, inputs_of, reader_of
from data_prep.manifest import manifest_of, tables
from data_prep.read import Read
from data_prep.split import Survey, SurveyBucket, held_out_draw, surveys
from data_prep.verify import verify
from modernenc.data.blocks import MANIFEST
from modernenc.evaluation.standard_error import tokens_for
from modernenc.run_folder.tables import ALL

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
"""What a source may be called: it is a folder, and a key of mixes."""
_WORK = ".work"
_MEASURED_BYTES = 1 << 18
"""Of each source, encoded to learn how many bytes a token has."""
_BLOCKS, _LEAST_BLOCK_TOKENS, _MOST_BLOCK_TOKENS = 512, 4_096, 32_768
_MUCH_CHANGED = 0.01
"""Share of characters that a given tokenizer may change before that is said."""


def build(corpus: Corpus) -> None:
    """Prepare `corpus.out`, or go on with it, or leave it alone when it is whole.

    Raises ValueError or FileNotFoundError, naming the key or the file, for a source that cannot be read or an `out` that holds
    another corpus.
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
    unfinished = root / f"{MANIFEST}.tmp"
    unfinished.write_text(json.dumps(manifest, indent=1))
    os.replace(unfinished, root / MANIFEST)
    try:
        verify(root)
    except (ValueError, FileNotFoundError):
        (root / MANIFEST).unlink()
        raise
    shutil.rmtree(work)
    for table in tables(manifest):
        console.print(table)
    print(f"{root} is ready")


def check(corpus: Corpus) -> None:
    """Raise ValueError, naming the key, for a setting that cannot be obeyed."""

    def require(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            raise ValueError(f"{key}={value}: expected {expected}")

    require(0 < corpus.validation_share < 1, "validation_share", corpus.validation_share, "a share in (0, 1)")
    require(corpus.validation_error > 0, "validation_error", corpus.validation_error, "a number of nats above 0, such as 0.02")
    require(0 <= corpus.max_dropped <= 1, "max_dropped", corpus.max_dropped, "a share in [0, 1]")
    for key in ("slices", "buckets", "workers", "shard_mb"):
        require(getattr(corpus, key) > 0, key, getattr(corpus, key), "1 or more")
    require(corpus.block_tokens >= 0, "block_tokens", corpus.block_tokens, "1 or more, or 0 for what suits the corpus")
    require(bool(corpus.sources), "sources", {}, "one source at least")
    for name, source in corpus.sources.items():
        require(bool(NAME.fullmatch(name)) and name != ALL, "sources", name,
                f"names of letters, digits, _, - and ., which begin with a letter or digit and are not {ALL}")  # fmt: skip
        require(bool(source.licence) != bool(source.license), f"sources.{name}.licence", source.licence or source.license,
                f"the licence of the texts, given once: sources.{name}.licence=CC-BY-4.0, or unknown")  # fmt: skip
        require(source.limit_mb >= 0, f"sources.{name}.limit_mb", source.limit_mb, "0, for all, or more")
    trained = not corpus.tokenizer.file
    require(not trained or corpus.tokenizer.vocab_size > 261, "tokenizer.vocab_size", corpus.tokenizer.vocab_size,
            "more than 261 (bytes and special tokens), or tokenizer.file=PATH")  # fmt: skip
    require(not trained or corpus.tokenizer.train_mb > 0, "tokenizer.train_mb", corpus.tokenizer.train_mb, "more than 0")
    if not trained:
        encode.roles(encode.given(Path(corpus.tokenizer.file)), corpus.tokenizer.roles)


def _look(corpus: Corpus, readings: list[Read]) -> None:
    """Read the first documents of each source; ValueError when there are none. Say what a given tokenizer does to them."""
    for reading in readings:
        texts = reading.peek()
        if corpus.tokenizer.file:
            tokenizer = encode.given(Path(corpus.tokenizer.file))
            changed = sum(encode.changed_characters(text, encode.normalized(tokenizer, text)) for text in texts)
            share = changed / sum(map(len, texts))
            if share > _MUCH_CHANGED:
                log.warning("sources.%s: tokenizer.file changes %.0f %% of its characters before encoding: the model sees "
                            "what it leaves", reading.source, 100 * share)  # fmt: skip


def _fingerprint(corpus: Corpus, inputs: dict[str, Inputs]) -> str:
    settings = OmegaConf.to_container(OmegaConf.structured(corpus), resolve=True)
    assert isinstance(settings, dict)
    for key in ("out", "workers", "max_dropped"):  # they do not change the result
        settings.pop(key)
    files = {name: entry.files for name, entry in inputs.items()}
    content = hashlib.sha256(json.dumps([settings, files], sort_keys=True).encode())
    if corpus.tokenizer.file:
        content.update(Path(corpus.tokenizer.file).read_bytes())
    return content.hexdigest()


def _work_folder(root: Path, fingerprint: str) -> Path:
    """The folder of unfinished work, made anew when it was for other inputs.

    ValueError when `root` holds anything else that is not of this work: nothing is deleted there.
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
    # One process per task already; the tokenizer's own threads would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if min(tasks, workers) == 1 else "false"
    LocalPipelineExecutor([step], tasks=tasks, workers=min(tasks, workers), logging_dir=str(logs)).run()


def _read(reading: Read, parts: int, corpus: Corpus, work: Path) -> Account:
    """Read a source; ValueError when too many of its documents are of no use."""
    _run(reading, parts, corpus.workers, work / "logs" / f"read-{reading.number:03d}")
    account = Account()
    for path in sorted((work / "accounts" / f"{reading.number:03d}").glob("*.json")):
        account.add(Account.load(path))
    account.check_faults(reading.source, corpus.max_dropped)
    return account


def _survey(corpus: Corpus, work: Path) -> dict[str, Survey]:
    tokens = tokens_for(corpus.validation_error)
    step = SurveyBucket(work, list(corpus.sources), corpus.validation_share, tokens, corpus.slices, corpus.seed)
    _run(step, corpus.buckets, corpus.workers, work / "logs" / "survey")
    return surveys(work, list(corpus.sources), corpus.validation_share)


def _tokenizer(corpus: Corpus, work: Path, found: dict[str, Survey]) -> encode.Tokenizer:
    path = work / "tokenizer.json"
    if not path.is_file():
        if corpus.tokenizer.file:
            made = encode.given(Path(corpus.tokenizer.file))
        else:
            made = encode.train(_sample(corpus, work, found), corpus.tokenizer.vocab_size)
        encode.save(made, path)
    tokenizer = encode.load(path)
    encode.roles(tokenizer, corpus.tokenizer.roles)
    entries = encode.vocab_size(tokenizer)
    if not corpus.tokenizer.file and entries < corpus.tokenizer.vocab_size:
        log.warning("tokenizer.vocab_size=%d: the text has pairs for %d entries only, so the vocabulary is that small; a model "
                    "for it needs no more", corpus.tokenizer.vocab_size, entries)  # fmt: skip
    return tokenizer


def _sample(corpus: Corpus, work: Path, found: dict[str, Survey]) -> Iterator[str]:
    """Texts to train the tokenizer on, of each source and bucket alike; none that may be held out."""
    for number, name in enumerate(corpus.sources):
        files = sorted((work / "buckets").glob(f"*/{number:03d}-*.jsonl.zst"))
        for file in files:
            left = corpus.tokenizer.train_mb * 1e6 / len(corpus.sources) / len(files)
            for document in _trained_on(file, found[name]):
                if left <= 0:
                    break
                left -= len(document.text)
                yield document.text


def _bytes_per_token(corpus: Corpus, work: Path, tokenizer: encode.Tokenizer, found: dict[str, Survey]) -> dict[str, float]:
    """Of text that is trained on, or of any where there is none."""
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
    first = survey.first_trained()
    for document in JsonlReader(str(file.parent)).read_file(file.name):
        if held_out_draw(document) >= first:
            yield document


def block_size(tokens: float) -> int:
    """Tokens of a block for a source of so many: a power of two, with which it has `_BLOCKS` blocks or as many as it can."""
    size = _MOST_BLOCK_TOKENS
    while size > _LEAST_BLOCK_TOKENS and tokens < _BLOCKS * size:
        size //= 2
    return size


def _write(corpus: Corpus, root: Path, work: Path, tokenizer: encode.Tokenizer, found: dict[str, Survey]) -> None:
    wanted, sizes = tokens_for(corpus.validation_error), _bytes_per_token(corpus, work, tokenizer, found)
    vocabulary = encode.vocab_size(tokenizer)
    smallest = min(found[name].bytes / sizes[name] for name in corpus.sources)
    corpus.block_tokens = corpus.block_tokens or block_size(smallest)
    step = WriteBlocks(
        root=root.resolve(),
        work=work.resolve(),
        thresholds={name: found[name].threshold(name, corpus.slices, wanted, sizes[name]) for name in corpus.sources},
        block_tokens=corpus.block_tokens,
        vocab_size=vocabulary,
        dtype="uint16" if vocabulary <= 1 << 16 else "uint32",
        shard_mb=corpus.shard_mb,
        slices=corpus.slices,
        seed=corpus.seed,
    )
    _run(step, corpus.buckets, corpus.workers, work / "logs" / "write")
