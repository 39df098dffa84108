"""Prepare a corpus: read and deal, train the tokenizer, write blocks, merge, verify, manifest.

Every step can be cut short: datatrove skips the tasks that are done, folders get their name when they are whole, and the
manifest, written last, is what makes the corpus one.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

import modernenc
from data_prep import encode
from data_prep.blocks import WriteBlocks
from data_prep.buckets import VALIDATION, Cap, Deal, split_of
from data_prep.config import Corpus
from data_prep.verify import verify
from modernenc.data.blocks import MANIFEST

log = logging.getLogger(__name__)


def build(corpus: Corpus) -> None:
    """Prepare `corpus.out`, or go on with it, or leave it alone when it is whole.

    Raises ValueError or FileNotFoundError, naming the key, for a source that cannot be read or an `out` that holds another
    corpus.
    """
    check(corpus)
    root = Path(corpus.out)
    inputs = {name: _inputs(name, source) for name, source in corpus.sources.items()}
    fingerprint = _fingerprint(corpus, inputs)
    if (root / MANIFEST).is_file():
        if json.loads((root / MANIFEST).read_text()).get("fingerprint") == fingerprint:
            print(f"{root} is up to date")
            return
        raise ValueError(
            f"out={root} holds a corpus made from other inputs or settings; choose another out, or delete that folder"
        )
    work = _work_folder(root, fingerprint)
    console = Console(stderr=True)
    with console.status("") as status:
        for name in corpus.sources:
            status.update(f"read {name} ({len(inputs[name])} files)")
            _read(corpus, name, work)
        status.update("train the tokenizer" if not corpus.tokenizer.file else "take the given tokenizer")
        tokenizer = _tokenizer(corpus, root, work)
        status.update("tokenize, shuffle and write blocks")
        _write(corpus, root, work, encode.vocab_size(tokenizer))
        status.update("merge")
        manifest = _manifest(corpus, root, work, tokenizer, fingerprint)
    unfinished = root / f"{MANIFEST}.tmp"
    unfinished.write_text(json.dumps(manifest, indent=1))
    os.replace(unfinished, root / MANIFEST)
    try:
        verify(root)
    except (ValueError, FileNotFoundError):
        (root / MANIFEST).unlink()
        raise
    shutil.rmtree(work)
    console.print(_table(manifest))
    print(f"{root} is ready")


def check(corpus: Corpus) -> None:
    """Raise ValueError, naming the key, for a setting that cannot be obeyed."""

    def require(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            raise ValueError(f"{key}={value}: expected {expected}")

    require(0 < corpus.validation_share < 1, "validation_share", corpus.validation_share, "a share in (0, 1)")
    for key in ("block_tokens", "slices", "buckets", "tasks", "workers", "shard_mb"):
        require(getattr(corpus, key) > 0, key, getattr(corpus, key), "1 or more")
    trained = not corpus.tokenizer.file
    require(not trained or corpus.tokenizer.vocab_size > 261, "tokenizer.vocab_size", corpus.tokenizer.vocab_size,
            "more than 261 (bytes and special tokens), or tokenizer.file=PATH")  # fmt: skip
    require(not trained or corpus.tokenizer.train_mb > 0, "tokenizer.train_mb", corpus.tokenizer.train_mb, "more than 0")
    if not trained and not Path(corpus.tokenizer.file).is_file():
        raise FileNotFoundError(f"tokenizer.file={corpus.tokenizer.file} does not exist; give the path of a tokenizer.json")


def _inputs(name: str, source: Any) -> list[str]:
    """What a source reads, with sizes and times, so that a change is noticed."""
    try:
        reader = instantiate(source.reader)
    except (HydraException, ValueError, OSError) as error:
        raise ValueError(f"sources.{name}.reader: {error}") from error
    if hasattr(reader, "files"):
        try:
            files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in reader.files()]
        except ValueError as error:
            raise ValueError(f"sources.{name}.reader: {error}") from error
    else:
        folder = reader.data_folder
        found = folder.list_files(recursive=reader.recursive, glob_pattern=reader.glob_pattern) if folder.exists("") else []
        files = [(path, info["size"], str(info.get("mtime", ""))) for path in found for info in [folder.info(path)]]
    if not files:
        where = OmegaConf.select(OmegaConf.create(source.reader), "data_folder", default="the packages named")
        raise FileNotFoundError(f"sources.{name}.reader: no files to read in {where}; check the path and glob_pattern")
    return [" ".join(map(str, file)) for file in files]


def _fingerprint(corpus: Corpus, inputs: dict[str, list[str]]) -> str:
    settings = OmegaConf.to_container(OmegaConf.structured(corpus), resolve=True)
    assert isinstance(settings, dict)
    for key in ("out", "workers", "tasks"):  # they do not change the result
        settings.pop(key)
    content = hashlib.sha256(json.dumps([settings, inputs], sort_keys=True).encode())
    if corpus.tokenizer.file:
        content.update(Path(corpus.tokenizer.file).read_bytes())
    return content.hexdigest()


def _work_folder(root: Path, fingerprint: str) -> Path:
    """The folder of unfinished work, emptied when it was for other inputs."""
    work = root / ".work"
    mark = work / "fingerprint"
    if work.exists() and not (mark.is_file() and mark.read_text() == fingerprint):
        log.warning("%s holds unfinished work on other inputs; starting over", work)
        shutil.rmtree(work)
    elif not work.exists() and root.exists() and any(root.iterdir()):
        raise ValueError(f"out={root} holds other files; choose an empty or new folder")
    work.mkdir(parents=True, exist_ok=True)
    mark.write_text(fingerprint)
    return work


def _run(pipeline: list[Any], tasks: int, workers: int, logs: Path) -> None:
    # One process per task already; the tokenizer's own threads would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if min(tasks, workers) == 1 else "false"
    LocalPipelineExecutor(pipeline, tasks=tasks, workers=min(tasks, workers), logging_dir=str(logs)).run()


def _read(corpus: Corpus, name: str, work: Path) -> None:
    source = corpus.sources[name]
    steps = [instantiate(source.reader), *(instantiate(entry) for entry in source.filters)]
    if source.limit_mb:
        steps.append(Cap(source.limit_mb))
    writer = JsonlWriter(str(work / "buckets"), output_filename=f"${{bucket}}/{name}-${{rank}}.jsonl.zst", compression="zstd")
    _run([*steps, Deal(name, corpus.buckets), writer], corpus.tasks, corpus.workers, work / "logs" / f"read-{name}")


def _tokenizer(corpus: Corpus, root: Path, work: Path) -> encode.Tokenizer:
    path = root / "tokenizer.json"
    if corpus.tokenizer.file:
        shutil.copyfile(corpus.tokenizer.file, path)
    elif not path.is_file():
        tokenizer = encode.train(_sample(corpus, work), corpus.tokenizer.vocab_size)
        unfinished = path.with_suffix(".tmp")
        tokenizer.save(str(unfinished))
        os.replace(unfinished, path)
    tokenizer = encode.load(path)
    encode.roles(tokenizer, corpus.tokenizer.roles)
    return tokenizer


def _sample(corpus: Corpus, work: Path):
    """Texts to train the tokenizer on, from every bucket and source alike; none that is held out."""
    reader = JsonlReader(str(work / "buckets"))
    files = sorted(reader.data_folder.list_files(recursive=True))
    each = corpus.tokenizer.train_mb * 1e6 / len(files)
    for file in files:
        left = each
        for document in reader.read_file(file):
            if left <= 0:
                break
            if split_of(document, corpus.validation_share, corpus.slices, corpus.seed) != VALIDATION:
                left -= len(document.text)
                yield document.text


def _write(corpus: Corpus, root: Path, work: Path, vocab_size: int) -> None:
    step = WriteBlocks(
        root=root.resolve(),
        work=work.resolve(),
        sources=list(corpus.sources),
        block_tokens=corpus.block_tokens,
        vocab_size=vocab_size,
        dtype="uint16" if vocab_size <= 1 << 16 else "uint32",
        shard_mb=corpus.shard_mb,
        slices=corpus.slices,
        validation_share=corpus.validation_share,
        seed=corpus.seed,
    )
    _run([step], corpus.buckets, corpus.workers, work / "logs" / "write")


def _merge(folder: Path, buckets: int) -> None:
    """One index over the shards of all buckets; they stay where they are."""
    shards = []
    for bucket in range(buckets):
        name = f"bucket-{bucket:05d}"
        if (folder / name).is_dir():
            for entry in json.loads((folder / name / "index.json").read_text())["shards"]:
                entry["raw_data"]["basename"] = f"{name}/{entry['raw_data']['basename']}"
                shards.append(entry)
    unfinished = folder / "index.json.tmp"
    unfinished.write_text(json.dumps({"version": 2, "shards": shards}))
    os.replace(unfinished, folder / "index.json")


def _manifest(corpus: Corpus, root: Path, work: Path, tokenizer: encode.Tokenizer, fingerprint: str) -> dict[str, Any]:
    reports = [json.loads((work / "counts" / f"{bucket:05d}.json").read_text()) for bucket in range(corpus.buckets)]
    counts: dict[str, Counter[str]] = {}
    for report in reports:
        for folder, values in report["folders"].items():
            counts.setdefault(folder, Counter()).update(values)
    splits = [f"slice-{number:03d}" for number in range(corpus.slices)]
    for name in corpus.sources:
        for split in [*splits, VALIDATION]:
            folder = f"{name}/{split}"
            if folder not in counts:
                raise ValueError(
                    f"sources.{name}: no document fell into {split}; the source is too small for "
                    f"slices={corpus.slices} and validation_share={corpus.validation_share}"
                )
            _merge(root / folder, corpus.buckets)
    unigrams = _unigrams(work, corpus.buckets)
    text = sum(values for folder, values in unigrams.items() if not folder.endswith(VALIDATION))
    roles = encode.roles(tokenizer, corpus.tokenizer.roles)
    sources = {
        name: {
            "licence": source.licence,
            "url": source.url,
            "dropped": _dropped(work, name) | {"duplicate": sum(r["duplicates"].get(name, 0) for r in reports)},
            "slices": {split: dict(counts[f"{name}/{split}"]) for split in splits},
            VALIDATION: dict(counts[f"{name}/{VALIDATION}"])
            | {"unigram_nats": _cross_entropy(unigrams[f"{name}/{VALIDATION}"], text)},
        }
        for name, source in corpus.sources.items()
    }
    vocabulary = encode.vocab_size(tokenizer)
    return {
        "name": corpus.name,
        "modernenc": modernenc.__version__,
        "fingerprint": fingerprint,
        "block_tokens": corpus.block_tokens,
        "dtype": "uint16" if vocabulary <= 1 << 16 else "uint32",
        "tokenizer": {
            "sha256": hashlib.sha256((root / "tokenizer.json").read_bytes()).hexdigest(),
            "vocab_size": vocabulary,
            "roles": roles,
            "special_ids": encode.special_ids(tokenizer, roles),
        },
        "sources": sources,
    }


def _unigrams(work: Path, buckets: int) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for bucket in range(buckets):
        with np.load(work / "counts" / f"{bucket:05d}.npz") as saved:
            for folder in saved.files:
                total[folder] = total.get(folder, 0) + saved[folder]
    return total


def _cross_entropy(held_out: np.ndarray, text: Any) -> float:
    """Nats per token of held-out text under the unigram frequencies of the training text, plus one."""
    frequencies = (np.asarray(text) + 1) / (np.sum(text) + len(held_out))
    return float(-(held_out * np.log(frequencies)).sum() / max(1, held_out.sum()))


def _dropped(work: Path, name: str) -> dict[str, int]:
    """Documents that reading and filters dropped, by reason, from datatrove's own statistics."""
    dropped: Counter[str] = Counter()
    for path in sorted((work / "logs" / f"read-{name}" / "stats").glob("*.json")):
        for step in json.loads(path.read_text()):
            counts = {key: value if isinstance(value, int) else value["total"] for key, value in step["stats"].items()}
            reasons = {key: count for key, count in counts.items() if key.startswith("dropped_")}
            if not reasons and "dropped" in counts:  # a filter that gives no reason is one
                reasons = {step["name"].split()[-1].lower(): counts["dropped"]}
            dropped.update({key.removeprefix("dropped_"): count for key, count in reasons.items()})
    return dict(dropped)


def _table(manifest: dict[str, Any]) -> Table:
    table = Table(title=f"{manifest['name']}: vocabulary {manifest['tokenizer']['vocab_size']:,}")
    table.add_column("source")
    for column in ("documents", "tokens", "blocks", "held-out tokens", "unigram nats", "dropped"):
        table.add_column(column, justify="right")
    for name, source in manifest["sources"].items():
        slices = source["slices"].values()
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in source["dropped"].items() if count)
        table.add_row(
            name,
            *(f"{sum(entry[key] for entry in slices):,}" for key in ("documents", "tokens", "blocks")),
            f"{source[VALIDATION]['tokens']:,}",
            f"{source[VALIDATION]['unigram_nats']:.2f}",
            dropped,
        )
    return table
