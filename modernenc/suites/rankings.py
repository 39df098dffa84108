"""Rankings of texts, and how good they are: nDCG@10 and recall@100 by pytrec_eval, which is trec_eval."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float

from modernenc.evaluation.metrics import Predictions
from modernenc.suites.retrieval_sets import RetrievalSet

DEPTH = 100
"""How many texts of a ranking count."""
MAIN, ALSO = ("ndcg_at_10",), ("recall_at_100",)
"""Metrics of which a score is made, and that are shown beside it."""
_MEASURES = {"ndcg_at_10": "ndcg_cut_10", "recall_at_100": "recall_100"}
_AT_ONCE = 1_000
"""Texts that are tokenized at once."""
Hits = list[tuple[float, str]]
"""Scores and ids of texts."""


def merge(best: Sequence[Hits], scores: Float[torch.Tensor, "queries texts"], texts: Sequence[str]) -> list[Hits]:
    """Return the best texts of each query of those so far and of some more, in order; equal ones by their ids.

    One more is kept than counts, in place of a query that is a text itself.
    """
    count = min(DEPTH + 1, len(texts))
    least = scores.topk(count, dim=1).values[:, -1:]
    rows, columns = (scores >= least).nonzero(as_tuple=True)  # with all that are equal to the last, which topk chooses among
    hits: list[Hits] = [list(mine) for mine in best]
    for row, column, score in zip(rows.tolist(), columns.tolist(), scores[rows, columns].tolist(), strict=True):
        hits[row].append((score, texts[column]))
    return [sorted(mine, key=lambda hit: (-hit[0], hit[1]))[: DEPTH + 1] for mine in hits]


def values_of(items: RetrievalSet, hits: Mapping[str, Hits]) -> Predictions:
    """Return each metric of each query of a set, in the order of its judgements."""
    import pytrec_eval

    run = {
        query: {document: -float(place) for place, document in enumerate(_ranking(items, query, hits[query]))}
        for query in items.test
    }  # by places and not by scores, of which trec_eval orders equal ones in a way of its own
    evaluator = pytrec_eval.RelevanceEvaluator(items.test, {"ndcg_cut.10", f"recall.{DEPTH}"})
    found = evaluator.evaluate(run)
    return {name: [found.get(query, {}).get(of, 0.0) for query in items.test] for name, of in _MEASURES.items()}


def _ranking(items: RetrievalSet, query: str, hits: Hits) -> list[str]:
    return [document for _, document in hits if not items.is_itself(query, document)][:DEPTH]


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text, with special ones, before it is cut."""
    parts = (list(texts[start : start + _AT_ONCE]) for start in range(0, len(texts), _AT_ONCE))
    return [len(ids) for part in parts for ids in tokenizer(part, truncation=False, verbose=False)["input_ids"]]
