"""BM25 (Robertson et al. 1994), by bm25s: what a model has to be better than, and where hard negatives are found."""

import random
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from typing import Any

from modernenc.suites.rankings import DEPTH, Hits
from modernenc.suites.retrieval_sets import RetrievalSet

K1, B = 0.9, 0.4
"""As Anserini has them: Yang et al. 2017."""
_WORD = re.compile(r"[^\W_]+")
"""Letters and digits, so that an underscore parts words: names in code are several words."""


def search(items: RetrievalSet, queries: Iterable[str], depth: int = DEPTH + 1) -> dict[str, Hits]:
    """Return the best texts of the corpus for each query, those without any of its words left out."""
    index, ids = _index(items), list(items.corpus)
    asked = list(queries)
    words = [_words(items.queries[query]) for query in asked]
    found: dict[str, Hits] = {query: [] for query in asked}
    with_words = [number for number, mine in enumerate(words) if mine]
    if not with_words:
        return found
    numbers, scores = index.retrieve(
        [words[number] for number in with_words], k=min(depth, len(ids)), show_progress=False, n_threads=0
    )
    for row, number in enumerate(with_words):
        scored = zip(scores[row].tolist(), numbers[row].tolist(), strict=True)
        hits = [(score, ids[text]) for score, text in scored if score > 0]
        found[asked[number]] = sorted(hits, key=lambda hit: (-hit[0], hit[1]))
    return found


@cache
def hard_negatives(items: RetrievalSet, count: int) -> dict[str, list[str]]:
    """Return for each query of the training split texts that are not relevant to it: those of the set, then BM25's best.

    Raises ValueError if the corpus is too small to have as many.
    """
    most = max(len(of) for of in items.train.values())
    if len(items.corpus) < most + count + 1:
        raise ValueError(
            f"negatives={count}: {items.name} has {len(items.corpus)} texts, up to {most} of them relevant to a query; lower it"
        )
    given = {query: items.negatives.get(query, [])[:count] for query in items.train}
    searched = search(items, [query for query in items.train if len(given[query]) < count], most + count + 1)
    chance, ids = random.Random(0), list(items.corpus)
    mined = {}
    for query, relevant in items.train.items():
        hits = (text for _, text in searched.get(query, []))
        drawn = (ids[chance.randrange(len(ids))] for _ in range(_DRAWS))
        candidates = chain(given[query], hits, drawn)  # any texts, where too few have a word of the query
        right = {items.text(text) for text in relevant}  # a copy of it is no negative
        wanted: dict[str, None] = {}
        for text in candidates:
            if len(wanted) == count:
                break
            if (
                text not in relevant
                and items.text(text) not in right
                and not (text in items.corpus and items.is_itself(query, text))
            ):
                wanted[text] = None
        mined[query] = list(wanted)
    return mined


def pairs(items: RetrievalSet, negatives: int) -> Iterator[dict[str, str]]:
    """Yield each pair of a query and a relevant text of the training split, with as many hard negatives, for a trainer."""
    mined = hard_negatives(items, negatives) if negatives else {}
    for query, relevant in items.train.items():
        for document in relevant:
            row = {"query": items.queries[query], "positive": items.text(document)}
            yield row | {f"negative_{number}": items.text(text) for number, text in enumerate(mined.get(query, []), 1)}


_DRAWS = 100_000
"""Texts that are drawn at most for a query, in a set most of whose texts are copies of relevant ones."""


@cache
def _index(items: RetrievalSet) -> Any:
    import bm25s

    index = bm25s.BM25(k1=K1, b=B)
    index.index([_words(text) for text in items.corpus.values()], show_progress=False)
    return index


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
