"""The training loop: a Lightning module that obeys the curriculum; one item of the loader is one optimizer step."""

import logging
import time
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from modernenc.backbones.attention import use_window_kernel
from modernenc.config import Run
from modernenc.curriculum import Curriculum, StepSpec
from modernenc.data.blocks import Corpus
from modernenc.data.loader import Step, Steps
from modernenc.data.state import DataState
from modernenc.data.worker import StepLoader
from modernenc.model import optim
from modernenc.model.build import checkpoint_activations, compile_layers, set_attributes
from modernenc.model.init_source import check_source, read_source
from modernenc.model.initialization import fill
from modernenc.model.unigrams import init_decoder_bias_from_unigrams
from modernenc.run_folder.checkpoints import Checkpoint
from modernenc.training.accumulator import Metrics
from modernenc.training.skipping import reason_to_skip, remember
from modernenc.training.snapshot import restore, restore_metrics, restore_optimizers
from modernenc.training.state import LoopState
from modernenc.training.strategy import split_parameters, synchronise_gradients

log = logging.getLogger(__name__)


class Pretraining(LoopState):
    """The training loop: one item of the loader is one optimizer step.

    The loss of a step is the mean over the predicted tokens, or items, of the global batch, however that is split.
    `checkpoint` is what to go on from; ValueError if it does not fit the run or the data.
    """

    def __init__(self, run: Run, curriculum: Curriculum, corpus: Corpus, checkpoint: Checkpoint | None = None) -> None:
        super().__init__(run, curriculum, corpus)
        self.automatic_optimization = False
        checkpoint_activations(self.objectives.backbone, run.trainer.activation_checkpointing_every)
        use_window_kernel(run.trainer.window_kernel)
        self._checkpoint = checkpoint
        """The checkpoint, until all parts of it are restored."""
        if checkpoint is not None:
            restore(self, checkpoint)
        elif run.init.source:
            source = read_source(Path(run.init.source), run)
            for note in check_source(source, run):
                log.warning(note)
            left = fill(self.objectives.masked_lm, source, run, corpus.tokenizer_file)
            log.info("starts with the weights of %s%s", run.init.source, f", but for {', '.join(left)}" if left else "")
        elif run.init.unigram:
            init_decoder_bias_from_unigrams(self.objectives.masked_lm, run, corpus)

    def configure_model(self) -> None:
        """Compile the layers if the recipe says so; under FSDP2, split the parameters over the ranks, layer by layer."""
        if self.compiles:
            compile_layers(self.objectives.backbone)
        split_parameters(self.objectives, self.trainer.strategy)

    @property
    def compiles(self) -> bool:
        """Whether the layers are compiled: only on a GPU in bf16, and only if the recipe says so."""
        trainer = self.run.trainer
        return trainer.compile and trainer.precision == "bf16-mixed" and self.trainer.strategy.root_device.type == "cuda"

    def configure_optimizers(self) -> list[Optimizer]:
        """Return the optimizers that the recipe chose, with their states from the checkpoint."""
        optimizers = optim.build(self.objectives, self.run.optim)
        if self._checkpoint is not None:
            restore_optimizers(self, optimizers, self._checkpoint)
        return optimizers

    def on_train_start(self) -> None:
        """Restore the metrics that were not logged yet, which needs the number of ranks, and free the checkpoint's tensors."""
        if self._checkpoint is not None:
            restore_metrics(self, self._checkpoint.state)
            # The command that reads the checkpoint holds it as long as the run takes, and so only its tensors can go.
            self._checkpoint.weights.clear()
            self._checkpoint.optimizers.clear()
            self._checkpoint = None
        if self.tokens_seen >= self.curriculum.total_tokens:  # only the last validation was missing
            self.trainer.should_stop = True

    def train_dataloader(self) -> StepLoader:
        """Return the loader of the steps from here on."""
        state = DataState.from_dict(self.data_state)
        steps = Steps(self.run, self.curriculum, self.corpus, self.global_rank, self.trainer.world_size, state)
        data = self.run.data
        return StepLoader(steps, data.workers, pin_memory=self.device.type == "cuda", timeout_s=data.loader_timeout_s)

    def transfer_batch_to_device(self, batch: Step, device: torch.device, dataloader_idx: int) -> Step:
        """Move the micro-batches to the device; the state of the data stays on the CPU."""
        batch.micro_batches = [micro_batch.to(device) for micro_batch in batch.micro_batches]
        return batch

    def training_step(self, batch: Step, batch_idx: int) -> None:
        """Take one optimizer step."""
        started = time.monotonic()
        spec = self.spec
        set_attributes(self.objectives.backbone, spec)
        optimizers = self.wrapped_optimizers()
        optim.apply((optimizer.optimizer for optimizer in optimizers), spec, self.run.optim["lr"])
        targets, stops, aborts = self.sum_over_ranks([batch.targets, self.stop_requested, bool(self.abort_reason)])
        loss = torch.zeros((), device=self.device)
        for number, micro_batch in enumerate(batch.micro_batches, 1):
            self._seed_dropout(micro_batch.first_row)
            with synchronise_gradients(self.objectives, self.trainer.strategy, number == len(batch.micro_batches)):
                part, _ = self.objectives(micro_batch)
                # Ranks average their gradients; the factor of the world size turns the average into a sum.
                self.manual_backward(part * (self.trainer.world_size / max(1, targets)))
            loss += part.detach()
        grad_norm = self._clip()
        # The same on all ranks, whose gradients are summed by now. On a GPU this waits for the backward pass.
        self.skip_reason = self._reason_to_skip(spec, float(grad_norm))
        if self.skip_reason:
            self.zero_grad()
        else:
            optim.step(optimizers)
        if not self.skipped_steps:
            self.skipped_since = self.tokens_seen
        self.skipped_steps = self.skipped_steps + 1 if self.skip_reason else 0
        self.last_spec = spec
        self.tokens_seen += spec.step_tokens
        self.step += 1
        self.data_state = batch.state
        metrics = self.metrics.setdefault(spec.objective, Metrics(spec, torch.zeros((), device=self.device)))
        if self.skip_reason:
            metrics.skip(spec, batch.tokens)
        else:
            metrics.add(spec, loss, int(targets), batch.tokens, grad_norm)
        self.stop_all_ranks, self.abort_all_ranks = stops > 0, aborts > 0
        self.seconds += time.monotonic() - started
        if self.stop_all_ranks or self.abort_all_ranks or self.tokens_seen >= self.curriculum.total_tokens:
            self.trainer.should_stop = True

    def _seed_dropout(self, first_row: int) -> None:
        """Make dropout a function of (seed, step, first row), whatever ran before."""
        words = np.random.SeedSequence([self.run.seed, self.step, first_row]).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0] >> np.uint64(1)))

    def _reason_to_skip(self, spec: StepSpec, norm: float) -> str:
        """Return why the step is skipped, or nothing, and remember its gradient norm."""
        if spec.phase != self.last_spec.phase:
            self.norms = {}
        earlier = self.norms.get(spec.objective, [])
        if self.run.skip_norm_sigmas:
            self.norms[spec.objective] = remember(norm, earlier)
        return reason_to_skip(norm, earlier, self.run.skip_norm_sigmas)

    def _clip(self) -> torch.Tensor:
        """Clip the gradient to `clip_grad_norm` if that is not 0, and return its norm over all ranks before."""
        parameters = list(self.objectives.parameters())
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if self.run.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.run.clip_grad_norm, norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
