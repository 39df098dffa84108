"""A vector for each text, as in DPR (Karpukhin et al. 2020): fine-tune by sentence-transformers, and rank by cosine."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from modernenc.evaluation.models import know_mega, max_positions
from modernenc.suites.bm25 import pairs
from modernenc.suites.rankings import Hits, merge, token_counts
from modernenc.suites.retrieval import SingleVectorSettings
from modernenc.suites.retrieval_sets import RetrievalSet
from modernenc.suites.sentence_trainer import fit

TEXTS_AT_ONCE = 50_000
"""Texts of the corpus of which the vectors are held in memory."""


class SingleVector:
    """A model that makes a vector of a text: mean pooling over tokens, or as the folder of sentence-transformers says."""

    def __init__(self, folder: Path, batch_size: int, max_length: int, precision: str) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        know_mega(folder)
        weights = {"dtype": torch.float32}  # whatever they were saved as: training updates them
        if (folder / "modules.json").is_file():
            self.model = SentenceTransformer(str(folder), model_kwargs=weights, trust_remote_code=False)
        else:
            encoder = Transformer(str(folder), model_kwargs=weights)
            self.model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension(), "mean")])
        first: Any = self.model[0]
        own = (self.model.max_seq_length or max_length, max_positions(first.auto_model.config))
        self.limit = min(max_length, *own)
        """Tokens beyond which texts are cut."""
        self.model.max_seq_length = self.limit
        self.batch_size = batch_size
        self.precision = precision

    def train(self, items: RetrievalSet, setting: SingleVectorSettings, seed: int) -> None:
        """Fine-tune on the pairs of a query and a relevant text, by InfoNCE over the texts of a batch and hard negatives."""
        transformers.set_seed(seed)
        rows = list(pairs(items, setting.negatives))
        # With a cache of gradients a batch is as large as it should be, whatever fits into memory: Gao et al. 2021.
        whole = setting.batch_size <= self.batch_size
        loss = (
            MultipleNegativesRankingLoss(self.model, scale=setting.scale)
            if whole
            else CachedMultipleNegativesRankingLoss(self.model, scale=setting.scale, mini_batch_size=self.batch_size)
        )
        fit(self.model, Dataset.from_list(rows), loss, setting, seed, "no_duplicates")  # else a text were its own negative

    def search(self, items: RetrievalSet, cut: int | None = None) -> dict[str, Hits]:
        """Return the best texts for each query of the held-out split; `cut` is the number of tokens of a text that are read."""
        with self._reading(None):
            queries = self._encode(self.model.encode_query, [items.queries[query] for query in items.test])
        best: list[Hits] = [[] for _ in items.test]
        texts = iter(items.corpus.items())
        with self._reading(cut):
            while some := dict(islice(texts, TEXTS_AT_ONCE)):
                vectors = self._encode(self.model.encode_document, list(some.values()))
                best = merge(best, self.model.similarity(queries, vectors), list(some))
        return dict(zip(items.test, best, strict=True))

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, before it is cut."""
        return token_counts(self.model.tokenizer, texts)

    def save(self, folder: Path) -> None:
        """Write the model as a folder of sentence-transformers."""
        self.model.save_pretrained(str(folder), create_model_card=False)

    @contextmanager
    def _reading(self, cut: int | None) -> Iterator[None]:
        """Cut texts at fewer tokens than the limit."""
        self.model.max_seq_length = min(self.limit, cut or self.limit)
        try:
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                yield
        finally:
            self.model.max_seq_length = self.limit

    def _encode(self, encode: Any, texts: list[str]) -> torch.Tensor:
        shown = sys.stderr.isatty()
        return encode(texts, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=shown).float()
