"""Sets to search, made on the spot."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

WORDS = [f"word{number}" for number in range(300)]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_qrels(path: Path, rows: Iterable[tuple[str, str, int]]) -> None:
    """Write judgements in BEIR's layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [("query-id", "corpus-id", "score"), *rows]))


def write_beir(folder: Path, texts: int = 40, words: int = 12) -> Path:
    """Write a set of random texts; the query of each is three of its words, and half of them are for training."""
    chance = random.Random(0)
    corpus = {f"d{number}": chance.sample(WORDS, words) for number in range(texts)}
    queries = {f"q{number}": chance.sample(corpus[f"d{number}"], 3) for number in range(texts)}
    write_lines(
        folder / "corpus.jsonl",
        ({"_id": one, "title": text[0], "text": " ".join(text[1:])} for one, text in corpus.items()),
    )
    write_lines(folder / "queries.jsonl", ({"_id": one, "text": " ".join(text)} for one, text in queries.items()))
    for split, numbers in (("train", range(texts // 2)), ("test", range(texts // 2, texts))):
        write_qrels(folder / "qrels" / f"{split}.tsv", [(f"q{number}", f"d{number}", 1) for number in numbers])
    return folder


def write_topics(folder: Path, topics: int = 8, texts: int = 8) -> Path:
    """Write a set in which no query has a word of the texts of its topic: what a model finds it has learned."""
    chance = random.Random(0)
    documents: list[dict[str, str]] = []
    queries: list[dict[str, str]] = []
    for topic in range(topics):
        asked, told = (WORDS[start + 10 * topic : start + 10 * topic + 10] for start in (0, 150))
        for number in range(texts):
            documents.append({"_id": f"d{topic}-{number}", "title": "", "text": " ".join(chance.sample(told, 6))})
            queries.append({"_id": f"q{topic}-{number}", "text": " ".join(chance.sample(asked, 4))})
    write_lines(folder / "corpus.jsonl", documents)
    write_lines(folder / "queries.jsonl", queries)
    for split, numbers in (("train", range(texts // 2)), ("test", range(texts // 2, texts))):
        pairs = [
            (f"q{topic}-{one}", f"d{topic}-{other}", 1) for topic in range(topics) for one in numbers for other in range(texts)
        ]
        write_qrels(folder / "qrels" / f"{split}.tsv", pairs)
    return folder
