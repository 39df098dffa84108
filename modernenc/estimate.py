"""What a run will take: matrix-product FLOPs, memory, hours, money."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from modernenc.config import Phase, Run
from modernenc.curriculum import CHOICES, MASKED_LM, Curriculum, items_at_once, objectives_of, reads_text, tokens_of_cycle
from modernenc.data.blocks import Corpus
from modernenc.sizes import MULTIPLE, in_windows

if TYPE_CHECKING:
    from torch import Tensor

    from modernenc.objectives import Objectives

WARMUP, STEPS = 2, 10
"""Steps of each phase that are measured, and those before."""
MOST_LEFT = 0.25
"""Share of a phase's text above which it is said what lies in windows when it ends."""
SAMPLE = 576
"""Tokens of the two forward passes that memory is measured on, and twice as many: enough for a document to take any path."""
SAMPLE_RATIO = 0.3
"""Mask ratio of the same; it matters to the last block and the head only."""


@dataclass(frozen=True)
class Device:
    """Dense bf16 peak in FLOP/s, and memory in bytes, by the vendor's data sheet."""

    peak: float
    memory: float


DEVICES = {
    "a100": Device(312e12, 80e9),
    "h100": Device(989e12, 80e9),
    "h200": Device(989e12, 141e9),
    "rtx4090": Device(165e12, 24e9),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, at the most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Of a micro-batch, with a chunk of the logits and the gradient of the decoder that is made with them."""

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def parameters(run: Run) -> tuple[int, int]:
    """Numbers of the model, and of what the optimizer keeps beside them."""
    from modernenc.optim import state_numbers

    objectives = _on_meta(run)
    count = sum(parameter.numel() for parameter in objectives.parameters())
    return count, state_numbers(run.optim["_target_"], objectives)


def document_length(phase: Phase, corpus: Corpus | None) -> int:
    """Mean tokens of a document in a row, special tokens included; the row's length when there is no text."""
    if corpus is None or not reads_text(phase):
        return phase.seq_len
    shares = corpus.slices(phase.mix)
    documents = sum(share * corpus.counts(path)["documents"] / corpus.counts(path)["tokens"] for path, share in shares.items())
    return min(phase.seq_len, round(1 / documents) + 2)


def flops(run: Run, phase: Phase, corpus: Corpus | None) -> float:
    """Of matrix products per token of a phase, forward and backward: twice as many backward as forward."""
    model = _on_meta(run).masked_lm
    forward_flops = model.backbone.describe().forward_flops
    head = sum(parameter.numel() for parameter in model.head.parameters() if parameter.ndim == 2)
    predicted = 2 * (head + model.decoder.weight.numel()) * phase.mask_ratio
    text = 3 * (forward_flops(document_length(phase, corpus)) + predicted) if reads_text(phase) else 0
    tokens = tokens_of_cycle(phase, run.tasks)
    tasks = sum(tokens[name] * 3 * forward_flops(run.tasks[name].seq_len) for name in tokens if name != MASKED_LM)
    return (tokens.get(MASKED_LM, 0) * text + tasks) / sum(tokens.values())


def memory(run: Run, phase: Phase, corpus: Corpus | None) -> Memory:
    """Of one device in a phase. Activations are measured: two small forward passes through blocks of the real widths."""
    ranks = run.trainer.devices * run.trainer.num_nodes
    split = ranks if run.trainer.strategy == "fsdp" else 1
    count, states = parameters(run)
    tokens = 0
    if reads_text(phase):
        rows = max(1, run.trainer.micro_batch_tokens // phase.seq_len)
        tokens = min(rows, -(-phase.batch_rows // ranks)) * phase.seq_len
    for task in (run.tasks[name] for name in objectives_of(phase) if name != MASKED_LM):
        items = items_at_once(task, run.trainer.micro_batch_tokens)
        tokens = max(tokens, min(items, -(-task.batch_items // ranks)) * CHOICES * task.seq_len)
    mask_ratio = phase.mask_ratio if reads_text(phase) else 0
    activations = _activations(run, mask_ratio, tokens, document_length(phase, corpus))
    return Memory(4 * count / split, 4 * count / split, 4 * states / split, activations)


def hours(run: Run, curriculum: Curriculum, corpus: Corpus | None, measured: dict[str, float]) -> dict[str, float]:
    """By phase, from what was measured here, or else from `estimate`; none without either."""
    given, ranks = run.estimate, run.trainer.devices * run.trainer.num_nodes
    answer = {}
    for name, phase in run.phases.items():
        tokens = curriculum.end_of(name) - curriculum.start_of(name)
        if speed := measured.get(name, given.tokens_per_s):
            answer[name] = tokens / speed / ranks / 3600
        elif given.device:
            answer[name] = tokens * flops(run, phase, corpus) / (DEVICES[given.device].peak * given.mfu * ranks) / 3600
    return answer


def measure(run: Run) -> dict[str, float]:
    """Tokens a second of each phase on one device of this machine, from some full steps of each; the data must be there."""
    from modernenc.bench.loop import bare, only

    speeds = {}
    for name, phase in run.phases.items():
        short = deepcopy(run)
        short.trainer.devices = short.trainer.num_nodes = 1
        only(short, name, WARMUP + STEPS)
        step_tokens = sum(tokens_of_cycle(phase, run.tasks).values()) / sum(objectives_of(phase).values())
        speeds[name] = step_tokens / bare(short, WARMUP + STEPS, WARMUP)
    return speeds


def warnings(run: Run, curriculum: Curriculum, corpus: Corpus | None) -> Iterator[str]:
    """What is legal and yet perhaps not meant."""
    yield from _shapes(run.backbone)
    ranks = run.trainer.devices * run.trainer.num_nodes
    before: tuple[str, float] | None = None
    for name, phase in run.phases.items():
        levels = curriculum.levels_of(name)
        if uneven := [level.batch_rows for level in levels if level.batch_rows % ranks]:
            yield f"phases.{name}: {uneven[0]} rows do not divide among {ranks} ranks: some wait for others"
        first = curriculum.at(curriculum.start_of(name)).lr
        if before and before[1] and first and not 0.2 <= first / before[1] <= 5:
            yield f"phases.{name}.lr: jumps from {before[1]:.3g} at the end of {before[0]} to {first:.3g}"
        before = name, curriculum.at(levels[-1].end_tokens - levels[-1].last_step_tokens).lr
        left, tokens = in_windows(run, phase, corpus.block_tokens if corpus else 0), curriculum.text_of(name)
        if left > MOST_LEFT * tokens:
            yield (
                f"phases.{name}: when its {tokens:,} tokens of text are over, up to {left:,} more lie in windows, drawn and "
                f"not trained on: each of {run.data.lanes} lanes holds up to {run.data.window_rows} rows and a block. Fewer do "
                "with lower data.window_rows or data.lanes (0 takes what suits the corpus), or with smaller blocks"
            )
        if given := run.estimate.device:
            needed, there = memory(run, phase, corpus).total, DEVICES[given].memory
            if needed > there:
                yield (
                    f"phases.{name}: about {needed / 1e9:.0f} GB do not fit {given}'s {there / 1e9:.0f} GB; lower "
                    "trainer.micro_batch_tokens, or set trainer.recompute_every=1 or trainer.strategy=fsdp"
                )
    if corpus and run.backbone["vocab_size"] > 1.05 * corpus.vocab_size + MULTIPLE:
        yield (
            f"backbone.vocab_size={run.backbone['vocab_size']} is more than the {corpus.vocab_size} entries of the tokenizer: "
            "the rest is never trained on; 0 takes the corpus's"
        )
    if corpus:
        yield from _passes(run, curriculum, corpus)


def _passes(run: Run, curriculum: Curriculum, corpus: Corpus) -> Iterator[str]:
    """Data that would be seen more than four times, from where repeating stops to pay: arXiv:2305.16264."""
    seen: dict[str, float] = {}
    for name, phase in run.phases.items():
        tokens = curriculum.text_of(name)
        for path, share in corpus.slices(phase.mix).items() if reads_text(phase) else ():
            seen[path] = seen.get(path, 0) + share * tokens / corpus.counts(path)["tokens"]
    for path, passes in seen.items():
        if passes > 4:
            yield f"{path} is seen {passes:.1f} times in all: lower its share, or add data"


def _shapes(backbone: dict[str, Any]) -> Iterator[str]:
    for key in ("hidden_size", "intermediate_size", "nffn_hidden_size", "vocab_size"):
        if backbone.get(key, 0) % 64:
            yield f"backbone.{key}={backbone[key]} is no multiple of 64: matrix products waste part of each tile"
    heads = backbone.get("num_attention_heads")
    if heads and backbone["hidden_size"] // heads not in (32, 64, 96, 128, 192, 256):
        width = backbone["hidden_size"] // heads
        yield f"backbone.num_attention_heads={heads}: heads of {width} are padded by FlashAttention; 64 or 128 are not"


def _on_meta(run: Run) -> "Objectives":
    return _shapes_of(json.dumps(run.backbone), tuple(run.tasks))


@lru_cache
def _shapes_of(backbone: str, tasks: tuple[str, ...]) -> "Objectives":
    import torch

    from modernenc.model import masked_lm_with
    from modernenc.objectives import Objectives

    with torch.device("meta"):
        return Objectives(masked_lm_with(json.loads(backbone)), tasks)


def _activations(run: Run, mask_ratio: float, tokens: int, document: int) -> float:
    """Bytes kept for the backward pass of so many tokens, and what the loss needs at its beginning."""
    from modernenc.objectives.linear_cross_entropy import CHUNK_ROWS

    kinds = _on_meta(run).backbone.describe().layer_types
    period = next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % p] for i in range(len(kinds))))
    period = math.lcm(period, run.trainer.recompute_every or 1)
    few = next(depth for depth in range(1, len(kinds) + 1) if kinds[depth - 1] == kinds[-1])
    deeper = (len(kinds) - few) / period

    again = run.trainer.recompute_every
    document = min(document, SAMPLE)

    def kept(sample: int) -> float:
        shallow = _kept(run, few, sample, document, again)
        return shallow + deeper * (_kept(run, few + period, sample, document, again) - shallow) if deeper else shallow

    def one_block(sample: int) -> float:
        return (_kept(run, few, sample, document, 0) - _kept(run, few, sample, document, 1)) / few

    def at_full_size(measured: Callable[[int], float]) -> float:
        sample = measured(SAMPLE)
        return sample + (measured(2 * SAMPLE) - sample) * (tokens - SAMPLE) / SAMPLE

    vocabulary, half = run.backbone["vocab_size"], run.trainer.precision == "bf16-mixed"
    # A chunk of the logits; and the gradient of the decoder, which is made with them, as it is and as the product that it adds.
    width, decoder = 2 if half else 4, vocabulary * run.backbone["hidden_size"]
    loss = min(CHUNK_ROWS, tokens * mask_ratio) * vocabulary * width + decoder * width
    # A block that makes its activations again has them, and gradients of some, when the logits are gone.
    backward = max(loss, 1.2 * at_full_size(one_block)) if again else loss
    return at_full_size(kept) + backward + 4 * decoder + (2 * decoder if half else 0)  # the decoder once more in bf16


def _kept(run: Run, depth: int, tokens: int, document: int, recompute_every: int) -> float:
    """Bytes that one forward pass keeps, weights left out."""
    settings = json.dumps([run.backbone, run.trainer.precision, recompute_every])
    return _bytes_kept(settings, depth, tokens, document)


@lru_cache
def _bytes_kept(settings: str, depth: int, tokens: int, document: int) -> float:
    """The same, once for phases that are alike."""
    import torch

    from modernenc.data.batch import MicroBatch
    from modernenc.model import masked_lm_with, recompute

    backbone, precision, recompute_every = json.loads(settings)
    backbone |= {"num_hidden_layers": depth, "vocab_size": 1}
    with torch.device("meta"):
        objective = masked_lm_with(backbone)
    # Not `to_empty`, which imports torch's compiler.
    weights = {name: torch.zeros(weight.shape) for name, weight in objective.state_dict().items()}
    objective.load_state_dict(weights, assign=True)
    recompute(objective.backbone, recompute_every)
    lengths = [document] * (tokens // document) + ([tokens % document] if tokens % document else [])
    places = torch.linspace(0, tokens - 1, round(tokens * SAMPLE_RATIO)).long()
    ends = np.cumsum([0, *lengths])
    batch = MicroBatch.of(np.zeros(tokens, np.int64), ends, places.numpy(), np.zeros(len(places), np.int64))
    with kept_bytes({id(parameter) for parameter in objective.parameters()}) as kept:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss, _ = objective(batch)
        del loss
    return float(sum(kept.values()))


@contextmanager
def kept_bytes(weights: set[int]) -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd keeps, by address; weights, by identity, are left out."""
    import torch

    kept: dict[int, int] = {}

    def keep(tensor: "Tensor") -> "Tensor":
        if id(tensor) not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
