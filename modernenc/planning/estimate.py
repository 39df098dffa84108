"""What a run takes: parameters, FLOPs of matrix products, hours."""

import json
from functools import lru_cache

import torch

from modernenc.config import Phase, Run
from modernenc.curriculum import MASKED_LM, Curriculum, cycle_tokens, reads_text
from modernenc.data.blocks import Corpus
from modernenc.model.build import masked_lm_with
from modernenc.model.optim import state_numbers
from modernenc.objectives import Objectives
from modernenc.planning.devices import DEVICES


def parameters(run: Run) -> tuple[int, int]:
    """Return how many parameters the model has, and how many numbers the optimizer keeps besides."""
    objectives = model_on_meta(run)
    count = sum(parameter.numel() for parameter in objectives.parameters())
    return count, state_numbers(run.optim["_target_"], objectives)


def document_length(phase: Phase, corpus: Corpus | None) -> int:
    """Return the mean tokens of a document in a row, special tokens included; without a corpus, the row's length."""
    if corpus is None or not reads_text(phase):
        return phase.seq_len
    fractions = corpus.slices(phase.mix)
    documents = sum(
        fraction * corpus.counts(path)["documents"] / corpus.counts(path)["tokens"] for path, fraction in fractions.items()
    )
    return min(phase.seq_len, round(1 / documents) + 2)


def flops(run: Run, phase: Phase, corpus: Corpus | None) -> float:
    """Return the FLOPs of matrix products per token of a phase; the backward pass has twice as many as the forward pass."""
    model = model_on_meta(run).masked_lm
    forward_flops = model.backbone.describe().forward_flops
    head = sum(parameter.numel() for parameter in model.head.parameters() if parameter.ndim == 2)
    predicted = 2 * (head + model.decoder.weight.numel()) * (phase.mask_ratio + (1 - phase.mask_ratio) * phase.causal_share)
    text = 3 * (forward_flops(document_length(phase, corpus)) + predicted) if reads_text(phase) else 0
    tokens = cycle_tokens(phase, run.tasks)
    tasks = sum(tokens[name] * 3 * forward_flops(run.tasks[name].seq_len) for name in tokens if name != MASKED_LM)
    return (tokens.get(MASKED_LM, 0) * text + tasks) / sum(tokens.values())


def hours(run: Run, curriculum: Curriculum, corpus: Corpus | None, measured: dict[str, float]) -> dict[str, float]:
    """Return the hours of each phase, from measured tokens a second, or else from `estimate`; nothing without either."""
    given, ranks = run.estimate, run.trainer.devices * run.trainer.num_nodes
    answer = {}
    for name, phase in run.phases.items():
        tokens = curriculum.end_of(name) - curriculum.start_of(name)
        if speed := measured.get(name, given.tokens_per_s):
            answer[name] = tokens / speed / ranks / 3600
        elif given.device:
            answer[name] = tokens * flops(run, phase, corpus) / (DEVICES[given.device].peak * given.mfu * ranks) / 3600
    return answer


def model_on_meta(run: Run) -> Objectives:
    """Return all that a run trains, without memory for its weights."""
    return _shapes_of(json.dumps(run.backbone), tuple(run.tasks))


@lru_cache
def _shapes_of(backbone: str, tasks: tuple[str, ...]) -> Objectives:
    with torch.device("meta"):
        return Objectives(masked_lm_with(json.loads(backbone)), tasks)
