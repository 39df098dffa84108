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
from data_prep.account import BEYOND_LIMIT, DUPLICATE, EMPTIED, Account, add, add_up, describe, load_parts
from data_prep.blocks import token_dtype
from data_prep.config import CorpusConfig
from data_prep.split import Survey
from modernenc.data.blocks import VALIDATION
from modernenc.data.tokenizer import Tokenizer, role_ids, special_token_ids, vocabulary_size
from modernenc.evaluation.standard_error import standard_error

_PREPARE_AGAIN = "delete the unfinished folder and prepare again"


def make_manifest(
    corpus: CorpusConfig,
    work: Path,
    tokenizer: Tokenizer,
    fingerprint: str,
    accounts: dict[str, Account],
    surveys: dict[str, Survey],
    passed_over: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """Merge the indexes of all buckets, and return the manifest as plain values.

    Raises ValueError when a document is unaccounted for, or a folder would have no document.
    """
    root = Path(corpus.out)
    counts = add_up(load_parts(work / "counts"))
    slices = [f"slice-{number:03d}" for number in range(corpus.slices)]
    for name in corpus.sources:
        for split in [*slices, VALIDATION]:
            if f"{name}/{split}" not in counts["folders"]:
                raise ValueError(f"sources.{name}: tokenizer.file leaves no token of any document in {split}; use another one")
            _merge_indexes(root / name / split)
    unigrams = _load_unigrams(work / "counts")
    trained = sum(values for folder, values in unigrams.items() if not folder.endswith(VALIDATION))
    roles = role_ids(tokenizer, vars(corpus.tokenizer.roles))
    specials = special_token_ids(tokenizer, roles)
    sources = {}
    for name, source in corpus.sources.items():
        account = accounts[name]
        add(account.faults, {file: {EMPTIED: count} for file, count in counts["emptied"].get(name, {}).items()})
        stored = {split: counts["folders"][f"{name}/{split}"] for split in [*slices, VALIDATION]}
        documents = sum(entry["documents"] for entry in stored.values())
        if account.beyond_limit:
            passed_over[name][BEYOND_LIMIT.format(LIMIT=f"{source.limit_mb:g}")] = account.beyond_limit
        in_text = sum(values for folder, values in unigrams.items() if folder.partition("/")[0] == name)
        held_out = stored.pop(VALIDATION)
        sources[name] = {
            "licence": source.licence or source.license,
            "url": source.url,
            **_describe_documents(name, account, surveys[name], documents, passed_over[name]),
            "text": counts["texts"][name],
            "special_tokens": {tokenizer.id_to_token(i): int(in_text[i]) for i in specials if in_text[i]},  # pyright: ignore[reportIndexIssue]
            "slices": stored,
            VALIDATION: {
                **held_out,
                "unigram_nats": _cross_entropy(unigrams[f"{name}/{VALIDATION}"], trained),
                "standard_error_nats": round(standard_error(held_out["tokens"]), 4),
            },
        }
    return {
        "name": corpus.name,
        "modernenc": modernenc.__version__,
        "fingerprint": fingerprint,
        "block_tokens": corpus.block_tokens,
        "dtype": token_dtype(vocabulary_size(tokenizer)),
        "validation_error": corpus.validation_error,
        "tokenizer": {
            "sha256": hashlib.sha256((root / "tokenizer.json").read_bytes()).hexdigest(),
            "vocab_size": vocabulary_size(tokenizer),
            "roles": roles,
            "special_ids": specials,
        },
        "sources": sources,
    }


def _describe_documents(
    name: str, account: Account, survey: Survey, stored: int, passed_over: dict[str, int]
) -> dict[str, Any]:
    """Return what became of the documents of a source, and of each file that did not keep all of its documents.

    Raises ValueError when the numbers do not add up, for a file or for the source.
    """
    kept, not_kept_whole = account.kept(), {}
    for file, read in account.read.items():
        faults, duplicates = account.faults.get(file, Counter()), survey.duplicates[file]
        if kept[file] + faults[EMPTIED] != survey.kept[file] + duplicates:
            raise ValueError(
                f"sources.{name}: {file} has {read:,} documents, but kept and dropped ones do not add up to that; "
                f"{_PREPARE_AGAIN}"
            )
        if kept[file] != read or duplicates:
            dropped = {**faults, **account.filtered.get(file, {}), **({DUPLICATE: duplicates} if duplicates else {})}
            not_kept_whole[file] = {"read": read, "stored": kept[file] - duplicates, "dropped": dropped}
    read, dropped = account.read.total(), {**account.dropped(), DUPLICATE: survey.duplicates.total()}
    if read != stored + sum(dropped.values()):
        raise ValueError(
            f"sources.{name}: {read:,} documents were read, but {stored:,} stored and {sum(dropped.values()):,} dropped; "
            f"{_PREPARE_AGAIN}"
        )
    files = {"read": len(account.read), "passed_over": passed_over, "not_kept_whole": not_kept_whole}
    return {"read": read, "stored": stored, "dropped": dropped, "files": files}


def _merge_indexes(folder: Path) -> None:
    """Write one index over the shards of all buckets; the shards stay where they are."""
    shards = []
    for path in sorted(folder.glob("bucket-*/index.json")):
        for entry in json.loads(path.read_text())["shards"]:
            entry["raw_data"]["basename"] = f"{path.parent.name}/{entry['raw_data']['basename']}"
            shards.append(entry)
    unfinished = folder / "index.json.tmp"
    unfinished.write_text(json.dumps({"version": 2, "shards": shards}))
    os.replace(unfinished, folder / "index.json")


def _load_unigrams(folder: Path) -> dict[str, np.ndarray]:
    """Return how often each token occurs in each folder of the corpus."""
    total: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as saved:
            for name in saved.files:
                total[name] = total.get(name, 0) + saved[name]
    return total


def _cross_entropy(held_out: np.ndarray, text: Any) -> float:
    """Return the nats per token of held-out text under the unigram distribution of the training text.

    Each token of the vocabulary counts once more than it occurs, so that none has probability zero.
    """
    frequencies = (np.asarray(text) + 1) / (np.sum(text) + len(held_out))
    return float(-(held_out * np.log(frequencies)).sum() / max(1, held_out.sum()))


def make_tables(manifest: dict[str, Any]) -> list[Table]:
    """Return two tables for a terminal: what became of the documents, and how many tokens there are."""
    documents = _table(f"{manifest['name']}: documents", "read", "stored", "duplicates", "dropped", "files passed over")
    tokens = _table(
        f"vocabulary {manifest['tokenizer']['vocab_size']:,}: tokens",
        "trained", "held out", "± nat", "unigram", "bytes/tok", "tok/word", "changed",
    )  # fmt: skip
    short = []
    for name, source in manifest["sources"].items():
        dropped = {reason: count for reason, count in source["dropped"].items() if reason != DUPLICATE}
        documents.add_row(name, f"{source['read']:,}", f"{source['stored']:,}", f"{source['dropped'][DUPLICATE]:,}",
                          describe(dropped) or "-", describe(source["files"]["passed_over"]) or "-")  # fmt: skip
        trained = sum(entry["tokens"] for entry in source["slices"].values())
        held_out, text = source[VALIDATION], source["text"]
        every = trained + held_out["tokens"]
        tokens.add_row(
            name, f"{trained:,}", f"{held_out['tokens']:,}",
            f"{held_out['standard_error_nats']:.3f}", f"{held_out['unigram_nats']:.2f}",
            f"{text['bytes'] / every:.2f}", f"{every / max(1, text['words']):.2f}",
            f"{text['changed_characters'] / max(1, text['characters']):.2%}",
        )  # fmt: skip
        if held_out["standard_error_nats"] > 1.1 * manifest["validation_error"]:
            short.append(name)
    specials = add_up(source["special_tokens"] for source in manifest["sources"].values())
    notes = ["± nat: standard error of the validation loss. unigram: that loss, in nats, of a model that knows only how "
             "frequent tokens are. changed: characters that the tokenizer's normaliser changes."]  # fmt: skip
    if short:
        notes.append(
            f"validation_share allows less held-out text than validation_error needs in: {', '.join(short)}; raise it for "
            "more exact validation losses."
        )
    if specials:
        notes.append(f"The tokenizer encodes some text as {describe(specials)}; these are predicted like any other token.")
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
