"""This package's candidates: a training step and an encoder."""

import torch

from modernenc.bench.batches import is_compiled, load_steps, step_work
from modernenc.bench.interleave import StepWork, Turn, device
from modernenc.config import Run
from modernenc.model import optim
from modernenc.model.allocator import keep_freed_memory
from modernenc.model.build import build_objectives, compile_layers

LR = 1e-4


def our_step(run: Run) -> Turn:
    """Prepare a turn that is one optimizer step on packed documents, outside the training loop."""
    keep_freed_memory()
    steps = [step.micro_batches for step in load_steps(run)]
    objectives = build_objectives(run).to(device())
    if is_compiled(run):
        compile_layers(objectives.backbone)
    optimizers = optim.build(objectives, {**run.optim, "lr": LR})

    def turn(number: int) -> StepWork:
        step = steps[number]
        targets = sum(len(batch.targets) for batch in step)
        with torch.autocast(device().type, torch.bfloat16, enabled=run.trainer.precision == "bf16-mixed"):
            for batch in step:
                loss, _ = objectives(batch.to(device()))
                (loss / targets).backward()
        optim.step(optimizers)
        return step_work(objectives.masked_lm, step)

    return turn


def our_encoder(run: Run, lengths: list[int]) -> Turn:
    """Prepare a turn that encodes random documents of these lengths in one packed batch."""
    keep_freed_memory()
    dtype = torch.bfloat16 if run.trainer.precision == "bf16-mixed" else torch.float32
    backbone = build_objectives(run).masked_lm.to(device(), dtype).eval().backbone
    ids = torch.randint(backbone.vocab_size, (sum(lengths),), device=device())
    ends = torch.tensor([0, *lengths], device=device()).cumsum(0).int()

    def turn(number: int) -> StepWork:
        with torch.inference_mode():
            backbone(ids, ends, max(lengths))
        return StepWork(len(ids), 0.0)

    return turn
