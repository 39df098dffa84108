"""This package's candidates, a training step and an encoder, and the batches of a benchmark's run."""

from collections.abc import Iterator, Sequence

import torch

from modernenc.bench.interleave import StepWork, Turn, device
from modernenc.config import Run
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.data.loader import Step, Steps
from modernenc.data.state import DataState
from modernenc.model import optim
from modernenc.model.allocator import keep_freed_memory
from modernenc.model.build import build_objectives, speed_up
from modernenc.objectives.masked_lm import MaskedLM

LR = 1e-4


def our_step(run: Run) -> Turn:
    """Prepare a turn that is one optimizer step on packed documents, outside the training loop."""
    keep_freed_memory()
    steps = list(load_steps(run))
    objectives = build_objectives(run).to(device())
    speed_up(objectives.backbone, run.trainer, device())
    optimizers = optim.build(objectives, {**run.optim, "lr": LR})

    def turn(number: int) -> StepWork:
        step = steps[number]
        with torch.autocast(device().type, torch.bfloat16):
            for batch in step.micro_batches:
                loss, _ = objectives(batch.to(device()))
                (loss / step.targets).backward()
        optim.step(optimizers)
        lengths = [length for batch in step.micro_batches for length in batch.unpadded().cu_seqlens.diff().tolist()]
        return step_work(objectives.masked_lm, lengths, step.targets)

    return turn


def our_encoder(run: Run, lengths: list[int]) -> Turn:
    """Prepare a turn that encodes random documents of these lengths in one packed batch."""
    keep_freed_memory()
    backbone = build_objectives(run).masked_lm.to(device(), torch.bfloat16).eval().backbone
    ids = torch.randint(backbone.vocab_size, (sum(lengths),), device=device())
    ends = torch.tensor([0, *lengths], device=device()).cumsum(0).int()

    def turn(number: int) -> StepWork:
        with torch.inference_mode():
            backbone(ids, ends, max(lengths))
        return StepWork(len(ids), 0.0)

    return turn


def load_steps(run: Run) -> Iterator[Step]:
    """Yield the batches of a run's optimizer steps on one rank, in order."""
    return iter(Steps(run, Curriculum.of(run), Corpus.of(run.data), 0, 1, DataState()))


def step_work(model: MaskedLM, lengths: Sequence[int], targets: int) -> StepWork:
    """Return the tokens of documents of these lengths and the FLOPs of their matrix products, forward and backward.

    The backward pass has twice as many as the forward pass; `targets` is the number of predicted tokens.
    """
    forward_flops = model.backbone.describe().forward_flops
    head = sum(parameter.numel() for parameter in model.head.parameters() if parameter.ndim == 2)
    predictions = 6.0 * targets * (head + model.decoder.weight.numel())
    return StepWork(sum(lengths), predictions + sum(3 * length * forward_flops(length) for length in lengths))
