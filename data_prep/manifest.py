"""The manifest of a corpus: its contents and origin, and what became of every document; and tables of it for a terminal."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

import modernenc
from data_prep.account import Account
from data_prep.blocks import token_dtype
from data_prep.config import CorpusConfig, SourceConfig
from data_prep.split import Survey
from modernenc.data.blocks import VALIDATION
from modernenc.data.tokenizer import Tokenizer, role_ids, special_token_ids, vocabulary_size
from modernenc.evaluation.standard_error import standard_error

_EMPTIED = "emptied by the tokenizer"


def manifest_of(
    corpus: CorpusConfig,
    root: Path,
    work: Path,
    tokenizer: Tokenizer,
    fingerprint: str,
    accounts: dict[str, Account],
    found: dict[str, Survey],
    passed_over: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """Merge the indexes of all buckets, and return the manifest as plain values.

    Raises ValueError when a document is unaccounted for, or a folder would have no document.
    """
    reports = [json.loads((work / "counts" / f"{bucket:05d}.json").read_text()) for bucket in range(corpus.buckets)]
    folders = _summed(report["folders"] for report in reports)
    texts = _summed(report["texts"] for report in reports)
    empty = _summed(report["empty"] for report in reports)
    splits = [f"slice-{number:03d}" for number in range(corpus.slices)]
    for name in corpus.sources:
        for split in [*splits, VALIDATION]:
            if f"{name}/{split}" not in folders:
                raise ValueError(f"sources.{name}: tokenizer.file leaves no token of any document in {split}; use another one")
            _merge(root / name / split, corpus.buckets)
    unigrams = _unigrams(work, corpus.buckets)
    trained = sum(values for folder, values in unigrams.items() if not folder.endswith(VALIDATION))
    roles = role_ids(tokenizer, vars(corpus.tokenizer.roles))
    specials = special_token_ids(tokenizer, roles)
    vocabulary = vocabulary_size(tokenizer)
    sources = {}
    for name, source in corpus.sources.items():
        account = accounts[name]
        for file, count in empty.get(name, Counter()).items():
            account.faults[file][_EMPTIED] += count
        stored = {split: dict(folders[f"{name}/{split}"]) for split in splits}
        held_out = dict(folders[f"{name}/{VALIDATION}"])
        documents = held_out["documents"] + sum(entry["documents"] for entry in stored.values())
        in_text = sum(values for folder, values in unigrams.items() if folder.partition("/")[0] == name)
        sources[name] = {
            "licence": source.licence or source.license,
            "url": source.url,
            **_accounted(name, source, account, found[name], documents, passed_over[name]),
            "text": dict(texts[name]),
            "special_tokens": {tokenizer.id_to_token(i): int(in_text[i]) for i in specials if in_text[i]},  # pyright: ignore[reportIndexIssue]
            "slices": stored,
            VALIDATION: held_out
            | {
                "unigram_nats": _cross_entropy(unigrams[f"{name}/{VALIDATION}"], trained),
                "standard_error_nats": round(standard_error(held_out["tokens"]), 4),
            },
        }
    return {
        "name": corpus.name,
        "modernenc": modernenc.__version__,
        "fingerprint": fingerprint,
        "block_tokens": corpus.block_tokens,
        "dtype": token_dtype(vocabulary),
        "validation_error": corpus.validation_error,
        "tokenizer": {
            "sha256": hashlib.sha256((root / "tokenizer.json").read_bytes()).hexdigest(),
            "vocab_size": vocabulary,
            "roles": roles,
            "special_ids": specials,
        },
        "sources": sources,
    }


def _accounted(
    name: str, source: SourceConfig, account: Account, survey: Survey, stored: int, passed_over: dict[str, int]
) -> dict[str, Any]:
    """Return what became of the documents of a source, and of each file that did not keep all of its documents.

    Raises ValueError when the numbers do not add up, for a file or for the source.
    """
    emptied = Counter({file: counts[_EMPTIED] for file, counts in account.faults.items()})
    kept, files = account.kept(), {}
    for file, read in account.read.items():
        duplicates = survey.duplicates[file]
        if kept[file] + emptied[file] != survey.kept[file] + duplicates:
            raise ValueError(f"sources.{name}: {file} has {read:,} documents, but kept and dropped ones do not add up to that; "
                             "delete the unfinished folder and prepare again")  # fmt: skip
        if kept[file] != read or duplicates:
            dropped = {**account.faults[file], **account.filtered[file], "duplicate": duplicates}
            files[file] = {"read": read, "stored": kept[file] - duplicates, "dropped": {k: v for k, v in dropped.items() if v}}
    dropped = {**account.dropped(), "duplicate": survey.duplicates.total()}
    if account.read.total() != stored + sum(dropped.values()):
        raise ValueError(f"sources.{name}: {account.read.total():,} documents were read, but {stored:,} stored and "
                         f"{sum(dropped.values()):,} dropped; delete the unfinished folder and prepare again")  # fmt: skip
    return {
        "read": account.read.total(),
        "stored": stored,
        "dropped": dropped,
        "files": {"read": len(account.read), "passed_over": passed_over | _beyond(source, account), "not_kept_whole": files},
    }


def _beyond(source: SourceConfig, account: Account) -> dict[str, int]:
    return {f"beyond limit_mb={source.limit_mb:g}": account.beyond_limit} if account.beyond_limit else {}


def _summed(reports: Any) -> dict[str, Counter[str]]:
    total: dict[str, Counter[str]] = {}
    for report in reports:
        for key, values in report.items():
            total.setdefault(key, Counter()).update(values)
    return total


def _merge(folder: Path, buckets: int) -> None:
    """Write one index over the shards of all buckets; the shards stay where they are."""
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


def _unigrams(work: Path, buckets: int) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for bucket in range(buckets):
        with np.load(work / "counts" / f"{bucket:05d}.npz") as saved:
            for folder in saved.files:
                total[folder] = total.get(folder, 0) + saved[folder]
    return total


def _cross_entropy(held_out: np.ndarray, text: Any) -> float:
    """Return the nats per token of held-out text under the unigram distribution of the training text.

    Each token of the vocabulary counts once more than it occurs, so that none has probability zero.
    """
    frequencies = (np.asarray(text) + 1) / (np.sum(text) + len(held_out))
    return float(-(held_out * np.log(frequencies)).sum() / max(1, held_out.sum()))


def tables(manifest: dict[str, Any]) -> list[Table]:
    """Return two tables for a terminal: what became of the documents, and how many tokens there are."""
    documents = _table(f"{manifest['name']}: documents", "read", "stored", "duplicates", "dropped", "files passed over")
    tokens = _table(
        f"vocabulary {manifest['tokenizer']['vocab_size']:,}: tokens",
        "trained", "held out", "± nat", "unigram", "bytes/tok", "tok/word", "changed",
    )  # fmt: skip
    for name, source in manifest["sources"].items():
        dropped = {reason: count for reason, count in source["dropped"].items() if reason != "duplicate" and count}
        documents.add_row(name, f"{source['read']:,}", f"{source['stored']:,}", f"{source['dropped']['duplicate']:,}",
                          _listed(dropped), _listed(source["files"]["passed_over"]))  # fmt: skip
        trained = sum(entry["tokens"] for entry in source["slices"].values())
        held_out, text = source[VALIDATION], source["text"]
        tokens.add_row(
            name,
            f"{trained:,}",
            f"{held_out['tokens']:,}",
            f"{held_out['standard_error_nats']:.3f}",
            f"{held_out['unigram_nats']:.2f}",
            f"{text['bytes'] / (trained + held_out['tokens']):.2f}",
            f"{(trained + held_out['tokens']) / max(1, text['words']):.2f}",
            f"{text['changed_characters'] / max(1, text['characters']):.2%}",
        )
    short = [name for name, source in manifest["sources"].items()
             if source[VALIDATION]["standard_error_nats"] > 1.1 * manifest["validation_error"]]  # fmt: skip
    specials = Counter[str]()
    for source in manifest["sources"].values():
        specials.update(source["special_tokens"])
    notes = ["± nat: standard error of the validation loss. unigram: that loss, in nats, of a model that knows only how "
             "frequent tokens are. changed: characters that the tokenizer's normaliser changes."]  # fmt: skip
    if short:
        notes.append(
            f"validation_share allows less held-out text than validation_error needs in: {', '.join(short)}; raise it for "
            "more exact validation losses."
        )
    if specials:
        notes.append(f"The tokenizer encodes some text as {_listed(specials)}; these are predicted like any other token.")
    tokens.caption = "\n".join(notes)
    return [documents, tokens]


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("source", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "-"
