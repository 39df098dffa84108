"""The state of the training loop: what a step changes, a checkpoint holds, and the callbacks read."""

from typing import Any, cast

import lightning.pytorch as L
import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from modernenc.config import Run
from modernenc.curriculum import Curriculum, StepSpec
from modernenc.data.blocks import Corpus
from modernenc.data.loader import fingerprint
from modernenc.data.state import DataState
from modernenc.kernels.device import to_device
from modernenc.model.build import build_objectives
from modernenc.training.accumulator import Metrics


class LoopState(L.LightningModule):
    """Objectives, optimizers and the position in the curriculum."""

    def __init__(self, run: Run, curriculum: Curriculum, corpus: Corpus) -> None:
        super().__init__()
        self.run = run
        self.curriculum = curriculum
        self.corpus = corpus
        self.fingerprint = fingerprint(run, corpus)
        self.objectives = build_objectives(run)
        self.tokens_seen = 0
        self.step = 0
        self.seconds = 0.0
        """Time spent training, over all resumes."""
        self.data_state = DataState().to_dict()
        self.stop_requested = False
        """Whether this process was asked to save and stop after the step."""
        self.abort_reason = ""
        """Why the run should stop without saving; set on the first rank."""
        self.save_requested = False
        """Whether a checkpoint is due by the clock; set on the first rank, since clocks differ."""
        self.stop_all_ranks = self.abort_all_ranks = self.save_all_ranks = False
        """Whether any rank asked for it before the last step ended; the same on all ranks."""
        self.last_spec = curriculum.at(0)
        """What the curriculum prescribed for the last step."""
        self.skipped_steps = 0
        """Steps in a row, up to the last one, that were skipped."""
        self.skipped_since = 0
        """Position before the first of them."""
        self.unstable_since: int | None = None
        """Position before the first of the last steps in a row that were skipped or spiked; None if the last one was not. Known
        on the first rank."""
        self.skip_reason = ""
        """Why the last step was skipped; empty if it was not."""
        self.norms: dict[str, list[float]] = {}
        """Gradient norms of the last steps of this phase, by objective, where large ones are skipped."""
        self.metrics: dict[str, Metrics] = {}
        """Metrics since the last call of `flush_metrics`, by objective."""

    @property
    def spec(self) -> StepSpec:
        """What the curriculum prescribes for the next step."""
        return self.curriculum.at(self.tokens_seen)

    @property
    def finished_phase(self) -> str:
        """The phase that ends exactly here; empty within a phase."""
        ends = {self.curriculum.end_of(phase): phase for phase in self.run.phases}
        return ends.get(self.tokens_seen, "")

    def crossed(self, every_tokens: float) -> bool:
        """Return whether the last step reached or passed a multiple of `every_tokens`; never for 0."""
        return every_tokens > 0 and self.tokens_seen // every_tokens > self.last_spec.tokens_seen // every_tokens

    @property
    def is_split(self) -> bool:
        """Whether each rank holds only its shard of the weights."""
        return isinstance(self.objectives, FSDPModule)

    def plain_optimizers(self) -> list[Optimizer]:
        """Return torch's optimizers without Lightning's wrappers."""
        return [optimizer.optimizer for optimizer in self.wrapped_optimizers()]

    def wrapped_optimizers(self) -> list[Any]:
        """Return Lightning's wrappers of the optimizers."""
        optimizers = cast(Any, self.optimizers(use_pl_optimizer=True))
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def flush_metrics(self) -> dict[str, Metrics]:
        """Return the metrics accumulated since the last call, by objective, and reset them."""
        metrics, self.metrics = self.metrics, {}
        return metrics

    def sum_over_ranks(self, numbers: list[float]) -> torch.Tensor:
        """Return each number summed over the ranks, in fp64 on the device, for which nothing has to wait."""
        summed = to_device(np.array(numbers, np.float64), self.device)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(summed)  # Lightning's own reduce waits at a barrier first
        return summed
