"""The batches of a benchmark's run, and the work that a step on them takes."""

from collections.abc import Iterator

from modernenc.bench.interleave import StepWork, device
from modernenc.config import Run
from modernenc.curriculum import Curriculum
from modernenc.data.batch import MicroBatch
from modernenc.data.blocks import Corpus
from modernenc.data.loader import Step, Steps
from modernenc.data.state import DataState
from modernenc.objectives.masked_lm import MaskedLM


def load_steps(run: Run) -> Iterator[Step]:
    """Yield the batches of a run's optimizer steps on one rank, in order."""
    return iter(Steps(run, Curriculum.of(run), Corpus.of(run.data), 0, 1, DataState()))


def step_work(model: MaskedLM, step: list[MicroBatch]) -> StepWork:
    """Return the tokens of a step and the FLOPs of their matrix products: forward, and twice as many backward."""
    head = sum(parameter.numel() for parameter in model.head.parameters() if parameter.ndim == 2)
    forward_flops = model.backbone.describe().forward_flops
    tokens, flops = 0, 0.0
    for batch in (batch.unpadded() for batch in step):
        tokens += batch.num_tokens
        flops += 6.0 * len(batch.targets) * (head + model.decoder.weight.numel())
        flops += sum(3 * length * forward_flops(length) for length in batch.cu_seqlens.diff().tolist())
    return StepWork(tokens, flops)


def is_compiled(run: Run) -> bool:
    """Return whether steps of the run are compiled here, by the same rule as in training: on a GPU in bf16 only."""
    return run.trainer.compile and run.trainer.precision == "bf16-mixed" and device().type == "cuda"
