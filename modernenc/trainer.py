"""The training loop: a Lightning module that obeys the curriculum, one loader item = one optimizer step."""

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from omegaconf import OmegaConf
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from modernenc import lineage, optim, ranks
from modernenc.config import Run
from modernenc.curriculum import Curriculum, Point
from modernenc.data.blocks import Corpus
from modernenc.data.loader import DataState, Step, Steps, fingerprint, merge
from modernenc.data.worker import StepLoader
from modernenc.initialization import begin_at_unigrams, check_source, fill, read_source
from modernenc.model import build_objectives, compile_parts, load_weights, recompute, set_backbone, weights_of

log = logging.getLogger(__name__)

_OF_ANOTHER_RANK = object()
"""Stands for what another rank saves."""


@dataclass
class Unrecorded:
    """Figures of an objective's steps since the last row of `metrics.csv`."""

    point: Point
    """The last of these steps."""
    loss: torch.Tensor
    """Summed over what this rank predicted, in nats."""
    targets: int
    """Predicted tokens, or items, of all ranks."""
    tokens: int
    """This rank's tokens, padding left out, since this process began."""
    grad_norm: torch.Tensor
    """Largest norm of a step's gradient, before clipping."""


class Pretraining(L.LightningModule):
    """Objectives, optimizers and the position in the curriculum.

    The loss of a step is the mean over the predicted tokens, or items, of the global batch, however it is split.
    `checkpoint` is the content to go on from; ValueError when it does not fit the run or the data.
    """

    def __init__(self, run: Run, curriculum: Curriculum, corpus: Corpus, checkpoint: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.run = run
        self.curriculum = curriculum
        self.corpus = corpus
        self.fingerprint = fingerprint(run, corpus)
        self.objectives = build_objectives(run)
        recompute(self.objectives.backbone, run.trainer.recompute_every)
        self.tokens_seen = 0
        self.step = 0
        self.seconds = 0.0
        """Time spent training, over all resumes."""
        self.data_state = DataState().to_dict()
        self.stop_requested = False
        """Whether this process was asked to save and stop after the step."""
        self.interrupted = False
        """Whether some rank was, before the last step began: all ranks know."""
        self.instability = ""
        """Why the run should stop without saving; set by the first rank."""
        self.abandoned = False
        """Whether there was such a reason, before the last step began: all ranks know."""
        self.last_point = curriculum.at(0)
        """What the curriculum said of the last step."""
        self.unrecorded: dict[str, Unrecorded] = {}
        """By objective."""
        self._optimizer_states: list[dict[str, Any]] = []
        self._before = ""
        """Ranks, threads and versions that saved what this run goes on from."""
        self._unrecorded_losses: dict[str, list[float]] = {}
        """Of the same ranks, by objective."""
        if checkpoint is not None:
            self._take_up(checkpoint)
        elif run.init.source:
            source = read_source(Path(run.init.source), run)
            for note in check_source(source, run):
                log.warning(note)
            left = fill(self.objectives.masked_lm, source, run, corpus.tokenizer_file)
            log.info("begins with the weights of %s%s", run.init.source, f", but for {', '.join(left)}" if left else "")
        elif run.init.unigram:
            begin_at_unigrams(self.objectives.masked_lm, run, corpus)

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

    def configure_model(self) -> None:
        """Compile what the recipe wants compiled; split the parameters over the ranks, block by block, under FSDP2."""
        if self.compiles:
            compile_parts(self.objectives.backbone)
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.objectives, FSDPModule):
            mesh = self.trainer.strategy.device_mesh["data_parallel"]
            for block in self.objectives.backbone.describe().layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.objectives, mesh=mesh)

    @property
    def compiles(self) -> bool:
        """Whether there is a GPU, and so a path, that the recipe wants compiled."""
        trainer = self.run.trainer
        return trainer.compile and trainer.precision == "bf16-mixed" and self.trainer.strategy.root_device.type == "cuda"

    def configure_optimizers(self) -> list[Optimizer]:
        """The optimizers that the recipe chose, with their states of the checkpoint."""
        optimizers = optim.build(self.objectives, self.run.optim)
        if self._optimizer_states:
            optim.restore(optimizers, optim.names_of(self.objectives), self._optimizer_states)
            self._optimizer_states = []
        return optimizers

    def on_fit_start(self) -> None:
        """Take up the unrecorded losses: each rank its own, where there are as many as there were; so their sum is the same."""
        by_objective, self._unrecorded_losses = self._unrecorded_losses, {}
        now = _described(self.trainer.world_size, torch.get_num_threads(), lineage.versions())
        if self._before and now != self._before:
            log.warning("%s, but %s before: weights will agree closely, not to the bit", now, self._before)
        for objective, losses in by_objective.items():
            if len(losses) != self.trainer.world_size:
                losses = [sum(losses)] + [0.0] * (self.trainer.world_size - 1)
            self.unrecorded[objective].loss = torch.tensor(losses[self.global_rank])

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
        set_backbone(self.objectives.backbone, point)
        optimizers = self._optimizers()
        optim.apply((optimizer.optimizer for optimizer in optimizers), point, self.run.optim["lr"])
        targets, requests, reasons = self.sum_over_ranks([batch.targets, self.stop_requested, bool(self.instability)])
        loss = torch.zeros((), device=self.device)
        for number, micro_batch in enumerate(batch.micro_batches, 1):
            self._seed_dropout(micro_batch.first_row)
            with self._synchronised(number == len(batch.micro_batches)):
                part, _ = self.objectives(micro_batch)
                # Gradients are averaged over ranks: times their number it is a sum.
                self.manual_backward(part * (self.trainer.world_size / max(1, targets)))
            loss += part.detach()
        grad_norm = self._clip()
        optim.step(optimizers)
        self.last_point = point
        self.tokens_seen += point.step_tokens
        self.step += 1
        self.data_state = batch.state
        nothing = torch.zeros((), device=self.device)
        since = self.unrecorded.get(point.objective, Unrecorded(point, nothing, 0, 0, nothing))
        self.unrecorded[point.objective] = Unrecorded(
            point,
            since.loss.to(self.device) + loss,
            since.targets + int(targets),
            since.tokens + batch.tokens,
            torch.maximum(since.grad_norm.to(self.device), grad_norm),
        )
        self.interrupted, self.abandoned = requests > 0, reasons > 0
        self.seconds += time.monotonic() - started
        if self.interrupted or self.abandoned or self.tokens_seen >= self.curriculum.total_tokens:
            self.trainer.should_stop = True

    @property
    def is_split(self) -> bool:
        """Whether each rank holds a share of the weights only."""
        return isinstance(self.objectives, FSDPModule)

    def snapshot(self, shares: bool) -> dict[str, Any]:
        """All that a run needs to go on after the last step, copied; every rank must ask.

        The first rank has it whole, or with its own share of what is split, where the others have theirs.
        """
        weights = weights_of(self.objectives)  # first: after a validation it makes FSDP2 put the split parameters back
        optimizers = [optimizer.optimizer for optimizer in self._optimizers()]
        states = optim.snapshot(optimizers, optim.names_of(self.objectives))
        tensors = _copied({"weights": weights, "optimizers": states}, shares, self.global_rank == 0)
        data = self._data_state_of_all_ranks()
        losses = self._of_all_ranks([float(since.loss) for since in self.unrecorded.values()])
        if self.global_rank:
            return tensors
        state = {
            "tokens_seen": self.tokens_seen,
            "step": self.step,
            "phase": self.last_point.phase,
            "boundary": bool(self.finished_phase),
            "seconds": self.seconds,
            "unrecorded": {
                objective: {
                    "at": since.point.tokens_seen,
                    "losses": losses[number],
                    "targets": since.targets,
                    "grad_norm": float(since.grad_norm),
                }
                for number, (objective, since) in enumerate(self.unrecorded.items())
            },
            "ranks": self.trainer.world_size,
            "data": data,
            **self.fingerprint,
            "threads": torch.get_num_threads(),
            "versions": lineage.versions(),
        }
        run = OmegaConf.to_container(OmegaConf.structured(self.run))
        return {"state": state, "run": run, **tensors}

    def recorded(self) -> dict[str, Unrecorded]:
        """The figures since the last call by objective, which start anew."""
        since, self.unrecorded = self.unrecorded, {}
        return since

    def sum_over_ranks(self, numbers: list[float]) -> list[float]:
        """Each number summed over the ranks."""
        if self.trainer.world_size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)  # Lightning's own reduce is two collectives: it waits at a barrier first
        return tensor.tolist()

    def _take_up(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state"]
        if state["corpus"] != self.fingerprint["corpus"]:
            raise ValueError(
                f"data.root={self.run.data.root}: not the data that the checkpoint was trained with (tokenizer, sources or "
                "shards differ); restore them, or start another run"
            )
        for name, hashed in state["tasks"].items():
            if name in self.run.tasks and hashed != self.fingerprint["tasks"][name]:
                raise ValueError(
                    f"tasks.{name}.train={self.run.tasks[name].train}: not the items that the checkpoint was trained with; "
                    "restore the file, or start another run"
                )
        self._before = _described(state["ranks"], state["threads"], state.get("versions", {}))
        load_weights(self.objectives, checkpoint["weights"])
        self._optimizer_states = checkpoint["optimizers"]
        self.tokens_seen = state["tokens_seen"]
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.data_state = state["data"]
        for objective, since in state["unrecorded"].items():
            self._unrecorded_losses[objective] = since["losses"]
            self.unrecorded[objective] = Unrecorded(
                self.curriculum.at(since["at"]), torch.zeros(()), since["targets"], 0, torch.tensor(since["grad_norm"])
            )

    def _of_all_ranks(self, numbers: list[float]) -> list[list[float]]:
        """Each number as each rank has it."""
        world = self.trainer.world_size
        spread = [0.0] * (len(numbers) * world)
        spread[self.global_rank :: world] = numbers
        summed = self.sum_over_ranks(spread)
        return [summed[at : at + world] for at in range(0, len(summed), world)]

    def _optimizers(self) -> list[Any]:
        optimizers = cast(Any, self.optimizers(use_pl_optimizer=True))
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def _data_state_of_all_ranks(self) -> dict[str, Any]:
        if self.trainer.world_size == 1:
            return self.data_state
        states: list[Any] | None = [None] * self.trainer.world_size if self.global_rank == 0 else None
        torch.distributed.gather_object(self.data_state, states)
        return merge([DataState.from_dict(state) for state in states]).to_dict() if states else {}

    def _seed_dropout(self, first_row: int) -> None:
        """Dropout is a function of (seed, step, row), not of what ran before."""
        words = np.random.SeedSequence([self.run.seed, self.step, first_row]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0] >> np.uint64(1)))

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Gradients cross ranks on the last micro-batch only."""
        if isinstance(self.objectives, FSDPModule):  # Lightning's own switch does nothing here
            self.objectives.set_requires_gradient_sync(last)
        elif isinstance(self.trainer.strategy, DDPStrategy) and not last:
            return self.trainer.strategy.block_backward_sync()
        return nullcontext()

    def _clip(self) -> torch.Tensor:
        """Norm of the gradient over all ranks, cut to `clip_grad_norm` where the recipe wants it."""
        parameters = list(self.objectives.parameters())
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.run.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.run.clip_grad_norm, norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _described(number: int, threads: int, versions: dict[str, str]) -> str:
    """What the bits of a run may depend on, in words."""
    return f"{ranks.described(number, threads)}, {lineage.described(versions)}"


def _copied(value: Any, shares: bool, first: bool) -> Any:
    """The same on the CPU, sharing nothing with what trains on."""
    if isinstance(value, dict):
        copies = {key: _copied(item, shares, first) for key, item in value.items()}
        return {key: copy for key, copy in copies.items() if copy is not _OF_ANOTHER_RANK}
    if isinstance(value, list):
        return [_copied(item, shares, first) for item in value]
    if isinstance(value, DTensor):
        value, first = (value.to_local(), True) if shares else (value.full_tensor(), first)
    if not first:
        return _OF_ANOTHER_RANK
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
