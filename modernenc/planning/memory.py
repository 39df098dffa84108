"""How much memory a run takes on each device."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from modernenc.config import Phase, Run
from modernenc.curriculum import CHOICES, MASKED_LM, items_per_micro_batch, objectives_of, reads_text
from modernenc.data.batch import MicroBatch
from modernenc.data.blocks import Corpus
from modernenc.model.build import checkpoint_activations, masked_lm_with
from modernenc.objectives.linear_cross_entropy import CHUNK_ROWS, GPU_CHUNK_ROWS
from modernenc.planning.estimate import document_length, model_on_meta, parameters

SAMPLE = 576
"""Tokens of the smaller of two forward passes that memory is measured on; the other one has twice as many. A document of this
length takes every code path of attention."""
SAMPLE_RATIO = 0.3
"""Fraction of predicted tokens in both passes, or more, which only matters to the last layer and the head."""


@dataclass(frozen=True)
class Memory:
    """Peak memory of one device in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Activations of a micro-batch, a chunk of the logits, and the decoder's gradient, which is computed with the logits."""

    @property
    def total(self) -> float:
        """Bytes of all parts together, on one device."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(run: Run, phase: Phase, corpus: Corpus | None) -> Memory:
    """Return the memory that a phase takes on one device.

    Activations are measured with two small forward passes through layers of the real widths.
    """
    ranks = run.trainer.devices * run.trainer.num_nodes
    split = ranks if run.trainer.strategy == "fsdp" else 1
    count, states = parameters(run)
    tokens = 0
    if reads_text(phase):
        rows = max(1, run.trainer.micro_batch_tokens // phase.seq_len)
        tokens = min(rows, -(-phase.batch_rows // ranks)) * phase.seq_len
    for task in (run.tasks[name] for name in objectives_of(phase) if name != MASKED_LM):
        items = items_per_micro_batch(task, run.trainer.micro_batch_tokens)
        tokens = max(tokens, min(items, -(-task.batch_items // ranks)) * CHOICES * task.seq_len)
    predicted = 1 if phase.causal_share else phase.mask_ratio if reads_text(phase) else 0
    activations = _peak_activations(run, predicted, tokens, document_length(phase, corpus))
    return Memory(4 * count / split, 4 * count / split, 4 * states / split, activations)


def _peak_activations(run: Run, predicted: float, tokens: int, document: int) -> float:
    """Return peak activation bytes: tensors saved for the backward pass, plus the working set of the loss.

    `predicted` is the fraction of the tokens that are predicted.
    """
    kinds = model_on_meta(run).backbone.describe().layer_types
    period = next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % p] for i in range(len(kinds))))
    period = math.lcm(period, run.trainer.activation_checkpointing_every or 1)
    few = next(depth for depth in range(1, len(kinds) + 1) if kinds[depth - 1] == kinds[-1])
    deeper = (len(kinds) - few) / period

    every = run.trainer.activation_checkpointing_every
    document = min(document, SAMPLE)

    def saved(sample: int) -> float:
        shallow = _saved_bytes(run, few, sample, document, every, predicted)
        deep = _saved_bytes(run, few + period, sample, document, every, predicted) if deeper else shallow
        return shallow + deeper * (deep - shallow)

    def one_layer(sample: int) -> float:
        kept, recomputed = (_saved_bytes(run, few, sample, document, step, predicted) for step in (0, 1))
        return (kept - recomputed) / few

    def at_full_size(measured: Callable[[int], float]) -> float:
        sample = measured(SAMPLE)
        return sample + (measured(2 * SAMPLE) - sample) * (tokens - SAMPLE) / SAMPLE

    vocabulary, half = run.backbone["vocab_size"], run.trainer.precision == "bf16-mixed"
    # A chunk of the logits, the decoder's gradient, and the matrix product that is added to it.
    width, decoder = 2 if half else 4, vocabulary * run.backbone["hidden_size"]
    chunk = GPU_CHUNK_ROWS if run.estimate.device else CHUNK_ROWS
    loss = min(chunk, tokens * predicted) * vocabulary * width + decoder * width
    # A layer that recomputes its activations holds them, and the gradients of some, after the logits were freed.
    backward = max(loss, 1.2 * at_full_size(one_layer)) if every else loss
    kept = 0.0
    if every and run.estimate.device:  # a GPU keeps what attention returned, and a number for each head
        heads = run.backbone.get("num_attention_heads", 0)
        kept = bool(heads) * tokens * len(kinds) / every * (width * run.backbone["hidden_size"] + 4 * heads)
    return at_full_size(saved) + kept + backward + 4 * decoder + (2 * decoder if half else 0)  # a bf16 copy of the decoder


def _saved_bytes(run: Run, depth: int, tokens: int, document: int, every: int, predicted: float) -> float:
    """Return the bytes that one forward pass saves for the backward pass, without weights."""
    settings = json.dumps([run.backbone, run.trainer.precision, every, max(SAMPLE_RATIO, predicted)])
    return _measured_bytes(settings, depth, tokens, document)


@lru_cache
def _measured_bytes(settings: str, depth: int, tokens: int, document: int) -> float:
    """Return the same for settings as JSON, so that phases with equal settings are measured once."""
    backbone, precision, every, ratio = json.loads(settings)
    backbone |= {"num_hidden_layers": depth, "vocab_size": 1}
    with torch.device("meta"):
        objective = masked_lm_with(backbone)
    # Not `to_empty`, which imports torch's compiler.
    weights = {name: torch.zeros(weight.shape) for name, weight in objective.state_dict().items()}
    objective.load_state_dict(weights, assign=True)
    checkpoint_activations(objective.backbone, every)
    lengths = [document] * (tokens // document) + ([tokens % document] if tokens % document else [])
    places = torch.linspace(0, tokens - 1, round(tokens * ratio)).long()
    ends = np.cumsum([0, *lengths])
    batch = MicroBatch.of(np.zeros(tokens, np.int64), ends, places.numpy(), np.zeros(len(places), np.int64))
    with saved_bytes({id(parameter) for parameter in objective.parameters()}) as kept:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss, _ = objective(batch)
        del loss
    return float(sum(kept.values()))


@contextmanager
def saved_bytes(weights: set[int]) -> Iterator[dict[int, int]]:
    """Collect the bytes of the storages that autograd saves, by address; weights, given by identity, do not count."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
