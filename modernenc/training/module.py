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
from modernenc.model.build import checkpoint_activations, compile_layers, compiles, keep_compiled_code, set_attributes
from modernenc.model.init_source import check_source, read_source
from modernenc.model.initialization import fill
from modernenc.model.token_counts import init_decoder_bias_from_unigrams, init_embeddings_from_neighbours
from modernenc.run_folder.checkpoints import Checkpoint
from modernenc.training.accumulator import Metrics
from modernenc.training.skipping import reason_to_skip, remember
from modernenc.training.snapshot import restore, restore_metrics, restore_optimizers
from modernenc.training.state import LoopState
from modernenc.training.strategy import share_embeddings, split_parameters, synchronise_gradients

log = logging.getLogger(__name__)

CLIP_EPS = 1e-6
"""Added to the norm by which clipping divides, as torch does."""


class Pretraining(LoopState):
    """The training loop: one item of the loader is one optimizer step.

    The loss of a step is the mean over the predicted tokens, or items, of the global batch, however that is split.
    `checkpoint` is what to go on from; ValueError if it does not fit the run or the data.
    """

    def __init__(self, run: Run, curriculum: Curriculum, corpus: Corpus, checkpoint: Checkpoint | None = None) -> None:
        super().__init__(run, curriculum, corpus)
        self.automatic_optimization = False
        use_window_kernel(run.trainer.window_kernel)
        checkpoint_activations(self.objectives.backbone, run.trainer.activation_checkpointing_every)
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
        else:
            if run.init.unigram:
                init_decoder_bias_from_unigrams(self.objectives.masked_lm, run, corpus)
            if run.init.neighbours:
                init_embeddings_from_neighbours(self.objectives.masked_lm, run, corpus)

    def configure_model(self) -> None:
        """Compile the layers if the recipe says so; under FSDP2, split the parameters over the ranks, layer by layer."""
        if self.compiles:
            kept = keep_compiled_code()
            log.info("the layers are compiled in the first steps: about a minute, or seconds with what %s holds", kept)
            compile_layers(self.objectives.backbone)
        if self.run.init.neighbours and self._checkpoint is None:
            share_embeddings(self.objectives, self.trainer.strategy)
        split_parameters(self.objectives, self.trainer.strategy)

    @property
    def compiles(self) -> bool:
        """Whether the layers are compiled."""
        return compiles(self.run.trainer, self.trainer.strategy.root_device)

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
        loss, world = torch.zeros((), device=self.device), self.trainer.world_size
        # Several ranks learn how many targets they have in all beside the gradients, and scale these afterwards.
        scale = 1 / max(1, batch.targets) if world == 1 else 1.0
        for number, micro_batch in enumerate(batch.micro_batches, 1):
            self._seed_dropout(micro_batch.first_row)
            with synchronise_gradients(self.objectives, self.trainer.strategy, number == len(batch.micro_batches)):
                part, _ = self.objectives(micro_batch)
                self.manual_backward(part * scale)
            loss += part.detach()
        requests = self.stop_requested, bool(self.abort_reason), self.save_requested
        sums = self.sum_over_ranks([batch.targets, *requests])
        # Ranks average their gradients; the factor of the world size turns the average into a sum.
        grad_norm = self._scale_and_clip(world / sums[0].clamp(min=1) if world > 1 else None)
        targets, *asked, norm = read(torch.cat([sums, grad_norm[None]]))
        self.stop_all_ranks, self.abort_all_ranks, self.save_all_ranks = (one > 0 for one in asked)
        self.skip_reason = self._reason_to_skip(spec, norm)
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

    def _scale_and_clip(self, factor: torch.Tensor | None) -> torch.Tensor:
        """Multiply the gradients by a factor and clip them to `clip_grad_norm`, in one pass, or none if neither is wanted.

        Returns their norm over all ranks, scaled and not clipped.
        """
        grads = [parameter.grad for parameter in self.objectives.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if factor is not None:
            factor, norm = factor.to(norm.dtype), (norm * factor).to(norm.dtype)
        if self.run.clip_grad_norm:
            clipping = (self.run.clip_grad_norm / (norm + CLIP_EPS)).clamp(max=1)
            factor = clipping if factor is None else factor * clipping
        if factor is not None:
            torch._foreach_mul_([grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads], factor)
        return norm


def read(numbers: torch.Tensor) -> list[float]:
    """Return the numbers of a step, for which the processor waits until a GPU has finished the backward pass.

    This is the only time in a step that it waits, but for DDP where an objective leaves weights out. The gradient's norm has to
    be known before the weights change.
    """
    return numbers.tolist()
