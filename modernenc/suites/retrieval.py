"""Suites of retrieval with one vector for each text: how models are fine-tuned, and what length is worth to them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from annotated_types import Gt
from omegaconf import MISSING

from modernenc.evaluation.cells import Curve, Findings, Request
from modernenc.evaluation.intervals import NORMAL, difference
from modernenc.evaluation.metrics import Predictions
from modernenc.evaluation.settings import read_settings
from modernenc.frozen import frozen
from modernenc.installed import check_installed
from modernenc.suites.rankings import MAIN, values_of
from modernenc.suites.retrieval_sets import RetrievalSet
from modernenc.suites.search import SearchCell, SearchSettings, TrainedCell, cut_notes, search_cells

if TYPE_CHECKING:
    from modernenc.suites.single_vector import SingleVector

LONG = "long_retrieval"
"""The suite in which scores are given by length as well."""
SHORTEST_CUT = 512
"""Tokens of the shortest cut of long texts; each further one is twice as long."""


@frozen
class SingleVectorSettings(SearchSettings):
    """Settings of models with one vector for each text."""

    scale: Annotated[float, Gt(0)] = MISSING
    """What cosines are multiplied by in the loss: the inverse of its temperature."""


SCHEMA = SingleVectorSettings
SCORING = ("mini_batch_size", "max_length", "precision")
"""Settings that matter to a model that is scored as it is."""


@dataclass(frozen=True)
class SingleVectorCell(TrainedCell):
    """What a model finds with one vector for each text; in the suite of long texts, at shorter cuts of them too."""

    def work(self, out: Path) -> Findings:
        """Fine-tune the model, and search with it."""
        assert self.items
        model = self.model_for(out)
        lengths = dict(zip(self.items.corpus, model.lengths(list(self.items.corpus.values())), strict=True))
        found = values_of(self.items, model.search(self.items))
        notes = cut_notes(lengths.values(), model.limit)
        if self.suite != LONG:
            return Findings(found, notes)
        by_cut = {cut: values_of(self.items, model.search(self.items, cut)) for cut in cuts(max(lengths.values()), model.limit)}
        by_cut[model.limit] = found
        relevant = [max(lengths[text] for text in texts) for texts in self.items.test.values()]
        return Findings(found, (*notes, *gains(by_cut)), curves(by_cut, relevant))

    @staticmethod
    def has_examples(items: RetrievalSet) -> bool:
        """Return whether a set has pairs for training."""
        return bool(items.train)

    def trained(self) -> "SingleVector":
        """Return the model, after it is fine-tuned."""
        from modernenc.suites.single_vector import SingleVector  # sentence-transformers takes seconds to import

        assert self.items
        model = SingleVector(self.model.folder, *(self.setting[key] for key in SCORING))
        if "epochs" in self.setting:
            model.train(self.items, SingleVectorSettings(**self.setting), self.seed)
        return model


def make_cells(request: Request) -> tuple[list[SearchCell], list[str]]:
    """Return the cells of the sets, and what to say of them.

    Raises FileNotFoundError or ValueError for what is no set or no setting, and ValueError if a package is missing.
    """
    check_installed("retrieval")
    settings = read_settings(SingleVectorSettings, request.settings, request.changes)
    variants = [{**asdict(settings), "lr": [lr]} for lr in settings.lr]
    return search_cells(request, SingleVectorCell, variants, SCORING)


def cuts(longest: int, limit: int) -> list[int]:
    """Return the lengths to which texts are cut, all shorter than what the model reads of the longest one."""
    found = []
    while (cut := SHORTEST_CUT << len(found)) < min(longest, limit):
        found.append(cut)
    return found


def curves(by_cut: Mapping[int, Predictions], relevant: Sequence[int]) -> dict[str, Curve]:
    """Return nDCG@10 by the cut of the texts and, at each cut, by the tokens of the relevant text, in powers of 2."""
    values = {cut: np.array(found[MAIN[0]]) for cut, found in by_cut.items()}
    tops = np.array([1 << (length - 1).bit_length() for length in relevant])
    bins = {f"{top // 2 + 1} to {top}": tops == top for top in np.unique(tops).tolist()}
    made = {"nDCG@10 by tokens of the texts that are read": _curve({str(cut): of for cut, of in values.items()})}
    for cut, of in values.items():
        title = f"nDCG@10 by tokens of the relevant text, of which {cut} are read"
        made[title] = _curve({name: of[mine] for name, mine in bins.items()})
    return made


def gains(by_cut: Mapping[int, Predictions]) -> list[str]:
    """Say by how much what the model reads at most is better than each shorter cut, with half of the 95 % interval."""
    longest = max(by_cut)
    said = []
    for cut in sorted(by_cut)[:-1]:
        gap = difference(MAIN, [by_cut[longest]], [by_cut[cut]])
        said.append(f"{longest} tokens of a text instead of {cut}: {100 * gap.score:+.1f} ±{100 * gap.error:.1f} nDCG@10")
    return said


def _curve(values: Mapping[str, np.ndarray]) -> Curve:
    means = [float(of.mean()) for of in values.values()]
    return Curve(list(values), means, [NORMAL * float(of.std() / len(of) ** 0.5) for of in values.values()])
