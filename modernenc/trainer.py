"""The training loop: a Lightning module that obeys the curriculum, one loader item = one optimizer step."""

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import lightning.pytorch as L
import numpy as np
import torch
from hydra.utils import get_method
from lightning.pytorch.strategies import ParallelStrategy
from torch.optim import Optimizer

from modernenc import optim
from modernenc.checkpoints import STATE_KEY
from modernenc.config import Run
from modernenc.curriculum import Curriculum, Point
from modernenc.data.blocks import Corpus
from modernenc.data.loader import DataState, Step, StepLoader, Steps, merge
from modernenc.model import build_objective, set_backbone

log = logging.getLogger(__name__)


class Pretraining(L.LightningModule):
    """Objective, optimizers and the position in the curriculum.

    The loss of a step is the mean over the predicted tokens of the global batch, however it is split.
    """

    def __init__(self, run: Run, curriculum: Curriculum, corpus: Corpus) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.run = run
        self.curriculum = curriculum
        self.corpus = corpus
        self.objective = build_objective(run)
        self.tokens_seen = 0
        self.step = 0
        self.seconds = 0.0
        """Time spent training, over all resumes."""
        self.data_state = DataState().to_dict()
        self.last_point = curriculum.at(0)
        """What the curriculum said of the last step."""
        self.step_sums: tuple[torch.Tensor, int, int] | None = None
        """Loss, predicted tokens and tokens of the last step."""

    @property
    def point(self) -> Point:
        """What the curriculum says of the next step."""
        return self.curriculum.at(self.tokens_seen)

    @property
    def finished_phase(self) -> str:
        """The phase that ends exactly here; empty in the midst of one."""
        ends = {self.curriculum.end_of(phase): phase for phase in self.run.phases}
        return ends.get(self.tokens_seen, "")

    def crossed(self, every_tokens: float) -> bool:
        """Whether the last step reached or passed a multiple of `every_tokens`; never for 0."""
        return every_tokens > 0 and self.tokens_seen // every_tokens > self.last_point.tokens_seen // every_tokens

    def configure_optimizers(self) -> list[Optimizer]:
        """The optimizers that the recipe chose."""
        arguments = {key: value for key, value in self.run.optim.items() if key != "_target_"}
        return get_method(self.run.optim["_target_"])(self.objective, self.objective.backbone, **arguments)

    def train_dataloader(self) -> StepLoader:
        """The steps from here on."""
        state = DataState.from_dict(self.data_state)
        steps = Steps(self.run, self.curriculum, self.corpus, self.global_rank, self.trainer.world_size, state)
        return StepLoader(steps, self.run.data.workers, pin_memory=self.device.type == "cuda")

    def transfer_batch_to_device(self, batch: Step, device: torch.device, dataloader_idx: int) -> Step:
        """Move the micro-batches; the state stays."""
        batch.micro_batches = [micro_batch.to(device) for micro_batch in batch.micro_batches]
        return batch

    def training_step(self, batch: Step, batch_idx: int) -> None:
        """One optimizer step."""
        started = time.monotonic()
        point = self.point
        set_backbone(self.objective.backbone, point)
        optimizers = cast(list[Any], self.optimizers(use_pl_optimizer=True))
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        optim.apply((optimizer.optimizer for optimizer in optimizers), point, self.run.optim["lr"])
        targets = int(self._sum_over_ranks(batch.targets))
        loss = torch.zeros((), device=self.device)
        for number, micro_batch in enumerate(batch.micro_batches, 1):
            self._seed_dropout(micro_batch.first_row)
            with self._synchronised(number == len(batch.micro_batches)):
                part = self.objective(micro_batch)
                # DDP averages over ranks: times their number it is a sum.
                self.manual_backward(part * (self.trainer.world_size / max(1, targets)))
            loss += part.detach()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.last_point = point
        self.tokens_seen += point.step_tokens
        self.step += 1
        self.data_state = batch.state
        self.step_sums = (loss, targets, batch.tokens)
        self.seconds += time.monotonic() - started
        if self.tokens_seen >= self.curriculum.total_tokens:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know: position, data state, and the run itself."""
        checkpoint[STATE_KEY] = {
            "tokens_seen": self.tokens_seen,
            "step": self.step,
            "phase": self.last_point.phase,
            "boundary": bool(self.finished_phase),
            "seconds": self.seconds,
            "data": self._data_state_of_all_ranks(),
            "tokenizer_sha256": self.corpus.manifest["tokenizer"]["sha256"],
            "threads": torch.get_num_threads(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up position and data state; ValueError when the data were made with another tokenizer."""
        state = checkpoint[STATE_KEY]
        if state["tokenizer_sha256"] != self.corpus.manifest["tokenizer"]["sha256"]:
            raise ValueError(
                f"data.root={self.run.data.root}: its tokenizer is not the one that the checkpoint was trained with"
            )
        if state["threads"] != torch.get_num_threads():
            log.warning(
                "%d threads, but %d at the checkpoint: weights will agree closely, not to the bit",
                torch.get_num_threads(),
                state["threads"],
            )
        self.tokens_seen = state["tokens_seen"]
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.data_state = state["data"]

    def _data_state_of_all_ranks(self) -> dict[str, Any]:
        if self.trainer.world_size == 1:
            return self.data_state
        states: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(states, self.data_state)
        return merge([DataState.from_dict(state) for state in states]).to_dict()

    def _seed_dropout(self, first_row: int) -> None:
        """Dropout is a function of (seed, step, row), not of what ran before."""
        words = np.random.SeedSequence([self.run.seed, self.step, first_row]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0] >> np.uint64(1)))

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Gradients cross ranks on the last micro-batch only."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) and not last else nullcontext()

    def _sum_over_ranks(self, count: int) -> float:
        if self.trainer.world_size == 1:
            return count
        total = self.trainer.strategy.reduce(torch.tensor(count, device=self.device), reduce_op="sum")
        return float(total)
