"""Prepare a corpus: list and look at the inputs, read, survey, train the tokenizer, write blocks, merge, verify.

Preparation can be interrupted at any moment and started again: datatrove skips the tasks that are done and repeats the
others, and the manifest is written last: only a folder with a manifest is a corpus.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from omegaconf import OmegaConf
from rich.console import Console

from data_prep import encode
from data_prep.account import Account, add_up, load_parts
from data_prep.blocks import write_bucket
from data_prep.config import CorpusConfig
from data_prep.inputs import Inputs, create_reader, list_inputs
from data_prep.manifest import make_manifest, make_tables
from data_prep.read import Read
from data_prep.split import Survey, held_out_draw, load_surveys, survey_bucket
from data_prep.verify import verify
from modernenc.atomic import write_json
from modernenc.data.blocks import MANIFEST
from modernenc.data.tokenizer import Tokenizer, load_tokenizer, role_ids, vocabulary_size
from modernenc.evaluation.standard_error import tokens_for
from modernenc.run_folder.tables import ALL

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
"""Valid names of a source, since it is the name of a folder and a key of mixes."""
_WORK = ".work"
_COUNTS = ("slices", "buckets", "workers", "shard_mb")
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
    inputs = {name: list_inputs(name, create_reader(name, source)) for name, source in corpus.sources.items()}
    fingerprint = _fingerprint(corpus, inputs)
    if (root / MANIFEST).is_file():
        if json.loads((root / MANIFEST).read_text()).get("fingerprint") == fingerprint:
            print(f"{root} is up to date")
            return
        raise ValueError(
            f"out={root} holds a corpus made from other inputs or settings; choose another out, or delete that folder"
        )
    work = root / _WORK
    readings = [
        Read(name, source, [file.path for file in inputs[name].files], work, number, corpus.buckets)
        for number, (name, source) in enumerate(corpus.sources.items())
    ]
    for reading in readings:
        _check_text(reading, corpus.tokenizer.file)
    _open_work_folder(work, fingerprint)
    console = Console(stderr=True)
    with console.status("") as status:
        accounts = {}
        for reading in readings:
            status.update(f"read {reading.source} ({len(reading.files):,} files)")
            _run(reading, f"read-{reading.number:03d}", inputs[reading.source].parts, corpus)
            account = Account(**add_up(load_parts(work / "accounts" / f"{reading.number:03d}")))
            account.check(reading.source, corpus.max_dropped)
            accounts[reading.source] = account
        status.update("survey")
        _run(partial(survey_bucket, corpus, work), "survey", corpus.buckets, corpus)
        surveys = load_surveys(work, corpus.validation_share)
        status.update("train the tokenizer" if not corpus.tokenizer.file else "take the given tokenizer")
        tokenizer = _make_tokenizer(corpus, work, surveys)
        status.update("tokenize, shuffle and write blocks")
        thresholds = _choose_sizes(corpus, work, tokenizer, surveys)
        step = partial(write_bucket, corpus, work, thresholds, vocabulary_size(tokenizer))
        _run(step, "write", corpus.buckets, corpus)
        status.update("merge and verify")
        shutil.copyfile(work / "tokenizer.json", root / "tokenizer.json")
        passed_over = {name: entry.passed_over for name, entry in inputs.items()}
        manifest = make_manifest(corpus, work, tokenizer, fingerprint, accounts, surveys, passed_over)
    # From here on the folder is a corpus, unless the check of every block finds a fault.
    write_json(root / MANIFEST, manifest)
    try:
        verify(root)
    except (ValueError, FileNotFoundError):
        (root / MANIFEST).unlink()
        raise
    shutil.rmtree(work)  # kept until now, so that preparation could be continued
    for table in make_tables(manifest):
        console.print(table)
    print(f"{root} is ready")


def check(corpus: CorpusConfig) -> None:
    """Raise ValueError, naming the key, for a setting that is out of range or missing."""
    share, error, tokenizer = corpus.validation_share, corpus.validation_error, corpus.tokenizer
    checks = [
        (0 < share < 1, "validation_share", share, "a fraction in (0, 1)"),
        (error > 0, "validation_error", error, "a number of nats above 0, such as 0.02"),
        (0 <= corpus.max_dropped <= 1, "max_dropped", corpus.max_dropped, "a fraction in [0, 1]"),
        *((value > 0, key, value, "1 or more") for key in _COUNTS for value in [getattr(corpus, key)]),
        (corpus.block_tokens >= 0, "block_tokens", corpus.block_tokens, "1 or more, or 0 to choose by the size of the corpus"),
        (bool(corpus.sources), "sources", {}, "at least one source"),
    ]
    allowed = corpus.licences
    for name, source in corpus.sources.items():
        licence = source.licence or source.license
        checks += [
            (bool(NAME.fullmatch(name)) and name != ALL, "sources", name,
             f"names of letters, digits, _, - and ., which begin with a letter or digit and are not {ALL}"),
            (bool(source.licence) != bool(source.license), f"sources.{name}.licence", licence,
             f"the licence of the texts, given once: sources.{name}.licence=CC-BY-4.0, or unknown"),
            (licence in allowed or not allowed, f"sources.{name}.licence", licence,
             f"one of licences=[{', '.join(allowed)}]; leave the source out, or allow its licence"),
            (source.limit_mb >= 0, f"sources.{name}.limit_mb", source.limit_mb, "a number above 0, or 0 to read all"),
        ]  # fmt: skip
    if not tokenizer.file:
        vocabulary = "more than 261 (bytes and special tokens), or tokenizer.file=PATH"
        checks.append((tokenizer.vocab_size > 261, "tokenizer.vocab_size", tokenizer.vocab_size, vocabulary))
        checks.append((tokenizer.train_mb > 0, "tokenizer.train_mb", tokenizer.train_mb, "more than 0"))
    for holds, key, value, expected in checks:
        if not holds:
            raise ValueError(f"{key}={value}: expected {expected}")
    if tokenizer.file:
        role_ids(encode.load_given(Path(tokenizer.file)), vars(tokenizer.roles))


def _check_text(reading: Read, tokenizer_file: str) -> None:
    """Read the first documents of a source, before the long work; raises ValueError when it has none.

    A warning says when a given tokenizer changes many of their characters.
    """
    texts = reading.peek()
    if tokenizer_file:
        tokenizer = encode.load_given(Path(tokenizer_file))
        sizes = add_up(encode.text_size(tokenizer, text) for text in texts)
        fraction = sizes["changed_characters"] / sizes["characters"]
        if fraction > _MUCH_CHANGED:
            log.warning("sources.%s: tokenizer.file changes %.0f %% of its characters before encoding: the model sees "
                        "the changed text only", reading.source, 100 * fraction)  # fmt: skip


def _fingerprint(corpus: CorpusConfig, inputs: dict[str, Inputs]) -> str:
    """Hash all that decides what the corpus contains: the settings, the input files, and a given tokenizer."""
    settings = OmegaConf.to_container(OmegaConf.structured(corpus), resolve=True)
    assert isinstance(settings, dict)
    for key in ("out", "workers", "max_dropped", "licences"):  # these do not change the result
        settings.pop(key)
    files = {name: entry.files for name, entry in inputs.items()}
    content = hashlib.sha256(json.dumps([settings, files], sort_keys=True).encode())
    if corpus.tokenizer.file:
        content.update(Path(corpus.tokenizer.file).read_bytes())
    return content.hexdigest()


def _open_work_folder(work: Path, fingerprint: str) -> None:
    """Create the folder of unfinished work, and empty one of work on other inputs or settings.

    Raises ValueError when there are files beside it that are not of this work, since nothing else is ever deleted.
    """
    root, mark = work.parent, work / "fingerprint"
    if not (mark.is_file() and mark.read_text() == fingerprint):
        others = sorted(path.name for path in root.iterdir() if path != work) if root.exists() else []
        if others:
            whose = "blocks of unfinished work on other inputs or settings" if work.exists() else "other files"
            raise ValueError(f"out={root} holds {whose} ({', '.join(others[:5])}); choose a new folder, or delete that one")
        if work.exists():
            log.warning("%s holds unfinished work on other inputs or settings; starting over", work)
            shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    mark.write_text(fingerprint)


def _run(step: Callable[..., None], name: str, tasks: int, corpus: CorpusConfig) -> None:
    """Run the tasks of a step in some processes, but for those that an interrupted preparation has finished."""
    workers = min(tasks, corpus.workers)
    # With several processes the tokenizer's own threads would only compete for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers == 1 else "false"
    LocalPipelineExecutor([step], tasks=tasks, workers=workers, logging_dir=str(Path(corpus.out, _WORK, "logs", name))).run()


def _make_tokenizer(corpus: CorpusConfig, work: Path, surveys: dict[str, Survey]) -> Tokenizer:
    """Return the given tokenizer, or train one."""
    path = work / "tokenizer.json"
    if not path.is_file():
        if corpus.tokenizer.file:
            tokenizer = encode.load_given(Path(corpus.tokenizer.file))
        else:
            tokenizer = encode.train(_sample(corpus, work, surveys), corpus.tokenizer.vocab_size)
        encode.save(tokenizer, path)
    # Always the saved file: the tokenizer is the same whether or not the preparation was interrupted.
    tokenizer = load_tokenizer(path)
    role_ids(tokenizer, vars(corpus.tokenizer.roles))
    entries = vocabulary_size(tokenizer)
    if not corpus.tokenizer.file and entries < corpus.tokenizer.vocab_size:
        log.warning("tokenizer.vocab_size=%d: the text has enough different pairs for %d entries only, which is the size of "
                    "the vocabulary now", corpus.tokenizer.vocab_size, entries)  # fmt: skip
    return tokenizer


def _sample(corpus: CorpusConfig, work: Path, surveys: dict[str, Survey]) -> Iterator[str]:
    """Yield the texts to train the tokenizer on: equally much from each source and bucket, and none that may be held out."""
    for number, name in enumerate(corpus.sources):
        files = _files_of(work, number)
        for file in files:
            # There is one file per bucket and part of the reading: all parts of a source contribute equally.
            left = corpus.tokenizer.train_mb * 1e6 / len(corpus.sources) / len(files)
            for text in _trained_texts(file, surveys[name]):
                if left <= 0:
                    break
                left -= len(text)
                yield text


def _bytes_per_token(work: Path, number: int, tokenizer: Tokenizer, survey: Survey) -> float:
    """Measure the bytes per token of source `number` on a sample of its training text; 1.0 where it certainly has none."""
    size = tokens = 0
    for text in (text for file in _files_of(work, number) for text in _trained_texts(file, survey)):
        size += len(text.encode())
        tokens += len(tokenizer.encode(text, add_special_tokens=False).ids)
        if size > _MEASURED_BYTES:
            break
    return size / max(1, tokens) or 1.0


def _files_of(work: Path, number: int) -> list[Path]:
    """Return the files of all buckets that hold the documents of source `number`."""
    return sorted((work / "buckets").glob(f"*/{number:03d}-*.jsonl.zst"))


def _trained_texts(file: Path, survey: Survey) -> Iterator[str]:
    """Yield the texts of a bucket's file that are never held out."""
    first = survey.first_trained()
    documents = JsonlReader(str(file.parent)).read_file(file.name)
    return (document.text for document in documents if held_out_draw(document) >= first)


def block_size(tokens: float) -> int:
    """Return the block size for a source of `tokens` tokens: the largest power of two that gives it at least
    `_WANTED_BLOCKS` blocks.

    Blocks have `_MIN_BLOCK_TOKENS` to `_MAX_BLOCK_TOKENS` tokens, so a small source has fewer of them.
    """
    size = _MAX_BLOCK_TOKENS
    while size > _MIN_BLOCK_TOKENS and tokens < _WANTED_BLOCKS * size:
        size //= 2
    return size


def _choose_sizes(corpus: CorpusConfig, work: Path, tokenizer: Tokenizer, surveys: dict[str, Survey]) -> dict[str, float]:
    """Return the draw below which the documents of each source are held out; set `corpus.block_tokens` where it is 0."""
    thresholds, smallest = {}, float("inf")
    for number, name in enumerate(corpus.sources):
        size = _bytes_per_token(work, number, tokenizer, surveys[name])
        thresholds[name] = surveys[name].threshold(name, corpus.slices, tokens_for(corpus.validation_error), size)
        smallest = min(smallest, surveys[name].bytes / size)
    # Each lane needs a block of each slice, so the smallest source decides.
    corpus.block_tokens = corpus.block_tokens or block_size(smallest)
    return thresholds
