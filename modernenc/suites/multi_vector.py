"""A vector for each token, as in ColBERT: fine-tune an encoder by PyLate (Chaffin & Sourty 2024), and rank by exact MaxSim."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from jaxtyping import Bool, Float
from pylate.losses import CachedContrastive, Distillation  # pyright: ignore[reportMissingImports]
from pylate.models import ColBERT  # pyright: ignore[reportMissingImports]
from pylate.utils import ColBERTCollator  # pyright: ignore[reportMissingImports]
from torch.nn.utils.rnn import pad_sequence

from modernenc.evaluation.models import know_mega, max_positions
from modernenc.suites.bm25 import pairs
from modernenc.suites.colbert import MultiVectorSettings
from modernenc.suites.rankings import Hits, merge, token_counts
from modernenc.suites.retrieval_sets import Ranked, RetrievalSet
from modernenc.suites.sentence_trainer import fit

TEXTS_AT_ONCE = 2_048
"""Texts of the corpus of which the vectors are held in memory."""
_SIMILARITIES = 1 << 27
"""Of two tokens each, that are held in memory."""


class MultiVector:
    """A model that makes a vector of each token of a text, of 128 numbers unless its folder, by PyLate, says otherwise."""

    def __init__(self, folder: Path, batch_size: int, query_length: int, max_length: int, precision: str, seed: int) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.getLogger("sentence_transformers").setLevel(logging.ERROR)  # which warns that an encoder is one
        transformers.set_seed(seed)  # of the projection of an encoder that has none
        know_mega(folder)
        weights = {"torch_dtype": torch.float32}  # whatever they were saved as: training updates them
        self.model = ColBERT(str(folder), query_length=query_length, model_kwargs=weights)
        self.limit = min(max_length, self._own_limit())
        """Tokens beyond which texts are cut when they are ranked."""
        self.model.document_length = self.limit
        self.batch_size = batch_size
        self.precision = precision

    def train(self, items: RetrievalSet, setting: MultiVectorSettings, seed: int) -> None:
        """Fine-tune by the divergence from a teacher's scores, or else by InfoNCE over the texts of a batch."""
        transformers.set_seed(seed)
        self.model.document_length = min(setting.train_length, self._own_limit())
        if items.teacher:
            data = Dataset.from_dict({"number": list(range(len(items.teacher)))})
            data.set_transform(lambda rows: _taught(items, [items.teacher[number] for number in rows["number"]], setting.ways))
            loss = Distillation(self.model)
        else:
            data = Dataset.from_list(list(pairs(items, setting.negatives)))
            loss = CachedContrastive(self.model, mini_batch_size=setting.mini_batch_size, temperature=setting.temperature)
        sampler = "batch_sampler" if items.teacher else "no_duplicates"  # else a text were its own negative
        fit(self.model, data, loss, setting, seed, sampler, ColBERTCollator(self.model.tokenize))
        self.model.document_length = self.limit

    def search(self, items: RetrievalSet) -> dict[str, Hits]:
        """Return the best texts for each query of the held-out split."""
        with self._computing():
            queries = pad_sequence(self._encode([items.queries[query] for query in items.test], True), batch_first=True)
        best: list[Hits] = [[] for _ in items.test]
        texts = iter(items.corpus.items())
        while some := dict(islice(texts, TEXTS_AT_ONCE)):
            with self._computing():
                vectors = self._encode(list(some.values()), False)
            best = merge(best, max_sim(queries, vectors), list(some))
        return dict(zip(items.test, best, strict=True))

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, with the mark of a text, before it is cut."""
        return [count + bool(self.model.document_prefix) for count in token_counts(self.model.tokenizer, texts)]

    def save(self, folder: Path) -> None:
        """Write the model as a folder of PyLate."""
        self.model.save_pretrained(str(folder), create_model_card=False)

    def _own_limit(self) -> int:
        return min(max_positions(self.model[0].auto_model.config), self.model.tokenizer.model_max_length)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def _encode(self, texts: list[str], is_query: bool) -> list[torch.Tensor]:
        vectors: Any = self.model.encode(
            texts, is_query=is_query, batch_size=self.batch_size, convert_to_numpy=False, show_progress_bar=sys.stderr.isatty()
        )
        return [one.float() for one in vectors]


def max_sim(
    queries: Float[torch.Tensor, "queries tokens size"], texts: Sequence[Float[torch.Tensor, "_ size"]]
) -> Float[torch.Tensor, "queries texts"]:
    """Return the sum over a query's vectors of the highest product with a vector of each text. Vectors of 0 count nothing."""
    scores = []
    for start in range(0, len(texts), 16):
        part = pad_sequence(list(texts[start : start + 16]), batch_first=True)
        there = pad_sequence([torch.ones(len(one), dtype=torch.bool) for one in texts[start : start + 16]], batch_first=True)
        scores.append(_scores_of(queries, part, there.to(part.device)))
    return torch.cat(scores, dim=1)


def _scores_of(
    queries: Float[torch.Tensor, "queries tokens size"],
    texts: Float[torch.Tensor, "texts words size"],
    there: Bool[torch.Tensor, "texts words"],
) -> Float[torch.Tensor, "queries texts"]:
    at_once = max(1, _SIMILARITIES // (queries.shape[1] * there.numel()))
    parts = []
    for some in queries.split(at_once):
        similar = torch.einsum("qth,dwh->qdtw", some, texts)
        parts.append(similar.masked_fill(~there[None, :, None, :], -torch.inf).amax(-1).sum(-1))
    return torch.cat(parts)


def _taught(items: RetrievalSet, taught: Sequence[Ranked], ways: int) -> dict[str, list[Any]]:
    """Return queries, each with texts and the teacher's scores of them, as PyLate's collator wants them."""
    return {
        "query": [items.queries[one.query] for one in taught],
        "documents": [[items.text(text) for text in one.documents[:ways]] for one in taught],
        "scores": [one.scores[:ways] for one in taught],
    }
