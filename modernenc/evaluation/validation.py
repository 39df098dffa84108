"""Validation on the same held-out rows with the same masks at every time, and on the held-out items of tasks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch.distributed.fsdp import FSDPModule

from modernenc.config import Run
from modernenc.curriculum import items_per_micro_batch, objectives_of, sources_of
from modernenc.data.batch import MicroBatch
from modernenc.data.blocks import VALIDATION, Corpus
from modernenc.data.choices import Choices
from modernenc.data.lanes import Chunk, Row, seed_of
from modernenc.data.masking import Masker
from modernenc.data.packing import SPECIALS, cut, pack
from modernenc.objectives import Objectives
from modernenc.objectives.masked_lm import MaskedLM
from modernenc.run_folder.tables import ALL, FIXED_RATIO


@dataclass(frozen=True)
class Score:
    """Validation on one source at one length and mask ratio, or on a task."""

    source: str
    """Name of the source, or of the task."""
    seq_len: int
    mask_ratio: float
    """0 for a task, which has no masks."""
    loss: float
    """Nats per predicted token, or per item."""
    accuracy: float
    targets: int

    @classmethod
    def of(cls, source: str, seq_len: int, mask_ratio: float, sums: torch.Tensor) -> "Score":
        """Return the score that follows from the sums of losses, of correct answers and of all answers."""
        loss, correct, targets = sums.tolist()
        return cls(source, seq_len, mask_ratio, loss / max(1, targets), correct / max(1, targets), int(targets))


def settings_of(run: Run, phase: str) -> list[tuple[int, float]]:
    """Return the row lengths and mask ratios at which a phase is validated."""
    first, current = next(iter(run.phases.values())), run.phases[phase]
    return sorted(
        {(seq_len, ratio) for seq_len in (first.seq_len, current.seq_len) for ratio in (FIXED_RATIO, current.mask_ratio)}
    )


class Validator:
    """Computes scores per source, at the first phase's length and the current one's, at 15 % and the current phase's ratio."""

    def __init__(self, run: Run, corpus: Corpus) -> None:
        self.run = run
        self.corpus = corpus
        self.sources = sources_of(run)
        self._rows: dict[tuple[str, int], list[Row]] = {}
        self._items: dict[str, list[MicroBatch]] = {}

    def scores(self, objectives: Objectives, phase: str) -> list[Score]:
        """Return all scores for a phase's settings and for the tasks of this phase and of those before it.

        The source `all` is the mean over the predicted tokens of all sources.
        """
        training = objectives.training
        objectives.eval()
        phases = list(self.run.phases)
        trained = {name for earlier in phases[: phases.index(phase) + 1] for name in objectives_of(self.run.phases[earlier])}
        scores = [score for setting in settings_of(self.run, phase) for score in self._score_text(objectives, *setting)]
        scores += [self._score_task(objectives, task) for task in self.run.tasks if task in trained]
        objectives.train(training)
        return scores

    def scores_at_reference(self, masked_lm: MaskedLM) -> list[Score]:
        """Return scores at the first phase's length and 15 %, which all phases have in common."""
        return list(self._score_text(masked_lm.eval(), next(iter(self.run.phases.values())).seq_len, FIXED_RATIO))

    def _score_text(self, model: Objectives | MaskedLM, seq_len: int, ratio: float) -> Iterator[Score]:
        total = torch.zeros(3, dtype=torch.float64)
        for source in self.sources:
            sums = _sum_over(model, self._batches(source, seq_len, ratio))
            total += sums
            yield Score.of(source, seq_len, ratio, sums)
        yield Score.of(ALL, seq_len, ratio, total)

    def _score_task(self, objectives: Objectives, name: str) -> Score:
        task = self.run.tasks[name]
        if name not in self._items:
            source = Choices(name, task, self.corpus, self.run.seed, validation=True)
            size = items_per_micro_batch(task, self.run.trainer.micro_batch_tokens)
            self._items[name] = [
                source.collate([source.encode(item) for item in items], [item.label for item in items], at)
                for at in range(0, len(source.items), size)
                for items in [source.items[at : at + size]]
            ]
        return Score.of(name, task.seq_len, 0.0, _sum_over(objectives, self._items[name]))

    def _batches(self, source: str, seq_len: int, ratio: float) -> Iterator[MicroBatch]:
        masker = Masker(self.corpus.roles, self.corpus.ordinary_ids, ratio)
        rows = self._rows_of(source, seq_len)
        seeds = [(self.run.seed, seed_of(source), number) for number in range(len(rows))]
        size = max(1, self.run.trainer.micro_batch_tokens // seq_len)
        for at in range(0, len(rows), size):
            yield masker.batch(rows[at : at + size], seeds[at : at + size], first_row=at)

    def _rows_of(self, source: str, seq_len: int) -> list[Row]:
        """Return rows of the first held-out documents of a source, as many as fit the budget."""
        if (source, seq_len) not in self._rows:
            shards = self.corpus.open(f"{source}/{VALIDATION}")
            chunks: list[Chunk] = []
            left = self.run.validation.tokens_per_source
            for shard, size in enumerate(shards.sizes):
                for index in range(size):
                    for tokens in cut(shards.read(shard, index), seq_len) if left > 0 else ():
                        if left > 0:
                            chunks.append(Chunk(tokens, source))
                            left -= len(tokens) + SPECIALS
            rows = pack([len(chunk.tokens) + SPECIALS for chunk in chunks], seq_len)
            self._rows[source, seq_len] = [[chunks[item] for item in row] for row in rows]
        return self._rows[source, seq_len]


@torch.no_grad()
def _sum_over(model: Objectives | MaskedLM, batches: Iterable[MicroBatch]) -> torch.Tensor:
    """Return the sums of losses, of correct answers and of all answers over batches.

    Ranks that hold the whole model share the batches. Where each holds a part (FSDP2), all must run every forward pass.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64)
    shared = torch.distributed.is_initialized() and not isinstance(model, FSDPModule)
    rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if shared else (0, 1)
    for batch in islice(batches, rank, None, ranks):
        batch = batch.to(device)
        loss, correct = model(batch)
        sums += torch.tensor([loss.item(), correct.item(), len(batch.targets)], dtype=torch.float64)
    if ranks == 1:
        return sums
    sums = sums.to(device)
    torch.distributed.all_reduce(sums)
    return sums.cpu()
