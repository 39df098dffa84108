"""Cells of retrieval: the sets of a folder, each searched by every model, and by BM25 beside them."""

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, MinLen
from omegaconf import MISSING

from modernenc.evaluation.cells import Cell, Findings, Request
from modernenc.evaluation.kept import TrainingCell, writing
from modernenc.evaluation.models import Model
from modernenc.frozen import frozen
from modernenc.suites import bm25
from modernenc.suites.rankings import ALSO, MAIN, values_of
from modernenc.suites.retrieval_sets import CODE_TO_TEXT, TEXT_TO_CODE, RetrievalSet, find_sets, read_set, reverse

CODE = "code"
"""The suite that takes sets in both directions."""
BM25 = Model("BM25", Path(), f"bm25s k1={bm25.K1} b={bm25.B}")


@frozen
class SearchSettings:
    """How a model is fine-tuned and scored, whatever vectors it makes; each learning rate is tried."""

    lr: Annotated[list[Annotated[float, Gt(0)]], MinLen(1)] = MISSING
    """Peak learning rates of AdamW without weight decay; they fall linearly to 0."""
    epochs: Annotated[int, Ge(0)] = MISSING
    """0 scores a model as it is, such as one that was trained for retrieval."""
    batch_size: Annotated[int, Ge(2)] = MISSING
    """Pairs of a query and a text in a step. Without a teacher's scores, the texts are negatives of the other queries."""
    mini_batch_size: Annotated[int, Ge(1)] = MISSING
    """Texts that are computed at once, in scoring and in training without a teacher."""
    warmup: Annotated[float, Interval(ge=0, lt=1)] = MISSING
    """Fraction of the steps in which the learning rate rises."""
    negatives: Annotated[int, Ge(0)] = MISSING
    """Without a teacher, hard negatives of a pair: texts that the set gives, or that BM25 finds."""
    max_length: Annotated[int, Ge(8)] = MISSING
    """Tokens beyond which texts are cut; the model's own limit holds too."""
    precision: Annotated[str, Literal["bf16", "fp32"]] = MISSING


@dataclass(frozen=True)
class SearchCell(Cell):
    """A search of a set, by nDCG@10, with recall@100 beside it."""

    metrics: tuple[str, ...] = MAIN
    also: tuple[str, ...] = ALSO
    items: RetrievalSet | None = None


@dataclass(frozen=True)
class Bm25Cell(SearchCell):
    """What BM25 finds: the floor."""

    def work(self, out: Path) -> Findings:
        """Search by words."""
        assert self.items
        return Findings(values_of(self.items, bm25.search(self.items, self.items.test)))


@dataclass(frozen=True)
class TrainedCell(SearchCell, TrainingCell):
    """What a model finds that is fine-tuned on the set first, where that has a split for it."""

    @staticmethod
    @abstractmethod
    def has_examples(items: RetrievalSet) -> bool:
        """Return whether a set has something to fine-tune on."""

    @abstractmethod
    def trained(self) -> Any:
        """Return the model, after it is fine-tuned."""

    def model_for(self, out: Path) -> Any:
        """Return the model, which is kept if it is wanted."""
        model = self.trained()
        if self.keep:
            with writing(self.folder(out)) as partial:
                model.save(partial)
        return model

    def train(self, out: Path, folder: Path) -> None:
        """Fine-tune the model for its own sake."""
        with writing(folder) as partial:
            self.trained().save(partial)


def search_cells(
    request: Request, kind: type[TrainedCell], variants: Sequence[dict[str, Any]], scoring: Collection[str]
) -> tuple[list[SearchCell], list[str]]:
    """Return a cell for each set, model, variant of the settings and seed, one for BM25 on each set, and notes on the sets.

    Models that are not trained, because `epochs` is 0 or there is nothing to train on, are scored once, with the settings that
    `scoring` names. Raises FileNotFoundError or ValueError for what is no set.
    """
    made: list[SearchCell] = []
    notes: list[str] = []
    for items in _sets(request):
        notes += items.notes
        is_trained = bool(variants[0]["epochs"] and kind.has_examples(items))
        if variants[0]["epochs"] and not is_trained:
            notes.append(f"{items.name} has no split for training: models are scored as they are")
        settings = variants if is_trained else [{key: variants[0][key] for key in scoring}]
        made.append(Bm25Cell(request.suite, BM25, items.name, items.fingerprint, items=items))
        made += [
            kind(
                request.suite, model, items.name, items.fingerprint, setting=setting, seed=seed, items=items,
                keep=request.keep and is_trained,
            )
            for seed in range(request.seeds if is_trained else 1)
            for model in request.models
            for setting in settings
        ]  # fmt: skip
    return made, notes


def cut_notes(lengths: Collection[int], limit: int) -> tuple[str, ...]:
    """Say which share of the texts is longer than what is read of them."""
    share = sum(length > limit for length in lengths) / len(lengths)
    return (f"{share:.1%} of the texts are cut at {limit} tokens",) if share else ()


def _sets(request: Request) -> Iterator[RetrievalSet]:
    """Yield the sets that are asked for; of code, both directions of each."""
    for folder in find_sets(request.data, request.tasks):
        items = read_set(folder)
        if request.suite == CODE:
            yield replace(items, name=f"{items.name}/{TEXT_TO_CODE}")
            yield replace(reverse(items), name=f"{items.name}/{CODE_TO_TEXT}", notes=())
        else:
            yield items
