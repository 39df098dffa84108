"""The suite of retrieval with a vector for each token, as in ColBERT (Khattab & Zaharia 2020): how models are fine-tuned."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt
from omegaconf import MISSING

from modernenc.evaluation.cells import Findings, Request
from modernenc.evaluation.settings import read_settings
from modernenc.frozen import frozen
from modernenc.installed import check_installed
from modernenc.suites.rankings import values_of
from modernenc.suites.retrieval_sets import RetrievalSet
from modernenc.suites.search import SearchCell, SearchSettings, TrainedCell, cut_notes, search_cells

if TYPE_CHECKING:
    from modernenc.suites.multi_vector import MultiVector


@frozen
class MultiVectorSettings(SearchSettings):
    """Settings of models with a vector for each token; a teacher's scores are learned where the set has them."""

    ways: Annotated[int, Ge(2)] = MISSING
    """Texts of each query that the teacher's scores are learned of: the first ones of its line."""
    temperature: Annotated[float, Gt(0)] = MISSING
    """What scores are divided by in the loss without a teacher."""
    query_length: Annotated[int, Ge(8)] = MISSING
    """Tokens of a query, to which shorter ones are filled up with mask tokens."""
    train_length: Annotated[int, Ge(8)] = MISSING
    """Tokens beyond which texts are cut in training, where `max_length` holds in scoring."""


SCHEMA = MultiVectorSettings
SCORING = ("mini_batch_size", "query_length", "max_length", "precision")
"""Settings that matter to a model that is scored as it is."""


@dataclass(frozen=True)
class MultiVectorCell(TrainedCell):
    """What a model finds with a vector for each token."""

    def work(self, out: Path) -> Findings:
        """Fine-tune the model, and search with it."""
        assert self.items
        model = self.model_for(out)
        lengths = model.lengths(list(self.items.corpus.values()))
        return Findings(values_of(self.items, model.search(self.items)), cut_notes(lengths, model.limit))

    @staticmethod
    def has_examples(items: RetrievalSet) -> bool:
        """Return whether a set has pairs for training, or a teacher's scores."""
        return bool(items.train or items.teacher)

    def trained(self) -> "MultiVector":
        """Return the model, after it is fine-tuned."""
        from modernenc.suites.multi_vector import MultiVector  # PyLate takes seconds to import

        assert self.items
        model = MultiVector(self.model.folder, *(self.setting[key] for key in SCORING), seed=self.seed)
        if "epochs" in self.setting:
            model.train(self.items, MultiVectorSettings(**self.setting), self.seed)
        return model


def make_cells(request: Request) -> tuple[list[SearchCell], list[str]]:
    """Return the cells of the sets, and what to say of them.

    Raises FileNotFoundError or ValueError for what is no set or no setting, and ValueError if a package is missing.
    """
    check_installed("colbert")
    settings = read_settings(MultiVectorSettings, request.settings, request.changes)
    made, notes = search_cells(request, MultiVectorCell, [{**asdict(settings), "lr": [lr]} for lr in settings.lr], SCORING)
    for cell in made if settings.epochs else []:
        least = min((len(ranked.documents) for ranked in cell.items.teacher), default=settings.ways) if cell.items else 0
        if least < settings.ways:
            raise ValueError(f"ways={settings.ways}: a line of {cell.task}/scores.jsonl has {least} scores; lower ways")
    return made, notes
