"""transformers' candidates, with sdpa attention: a training step and an encoder, and the batches that they take."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers
from hydra.utils import get_class
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForMaskedLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from modernenc.bench.batches import is_compiled, load_steps, step_work
from modernenc.bench.interleave import StepWork, Turn, device
from modernenc.config import Run
from modernenc.data.batch import MicroBatch
from modernenc.hugging_face import converter_of
from modernenc.model.build import build_objectives
from modernenc.objectives.masked_lm import MaskedLM

LR = 1e-4
FILL = {"input_ids": 0, "attention_mask": 0, "labels": -100}
"""Values of padding."""


def check_peer(backbone: str, run: Run) -> None:
    """Raise ValueError if transformers has no model of this type of its own; transformers 5 has no MEGA."""
    types = converter_of(get_class(run.backbone["_target_"])).model_types
    if not set(types) & set(CONFIG_MAPPING_NAMES):
        raise ValueError(
            f"backbones={backbone}: transformers {transformers.__version__} has no {types[0]} to compare with; install "
            "'transformers<5', or choose parts that need no peer: step with peers=[], data, loop, roofline"
        )


def new_transformers_model(ours: MaskedLM) -> Any:
    """Return transformers' own class, not the code shipped with an export, in the same shape and with new weights."""
    settings = converter_of(ours.backbone).new_model(ours.backbone).config.to_dict()
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[settings.pop("model_type")])
    return AutoModelForMaskedLM.from_config(config_class(**settings))


def transformers_model(ours: MaskedLM) -> Any:
    """Return transformers' own class with the weights of ours."""
    model = new_transformers_model(ours)
    model.load_state_dict(converter_of(ours.backbone).to_hugging_face(ours.state_dict()))
    return model


def peer_step(batching: str, run: Run, sparse: bool = False) -> Turn:
    """Prepare a turn that is one optimizer step of transformers' model, on the same weights and documents as ours.

    `batching` is padded or rows. With `sparse`, logits are computed at the predicted tokens only.
    """
    steps = [step.micro_batches for step in load_steps(run)]
    ours = build_objectives(run).masked_lm
    model = transformers_model(ours).to(device()).train()
    model.sparse_prediction = sparse
    if is_compiled(run):
        model.compile(dynamic=None if sparse else batching == "padded")
    optimizer = torch.optim.AdamW(model.parameters(), LR, fused=True)

    def turn(number: int) -> StepWork:
        step = steps[number]
        if batching == "padded":
            batches = list(padded(step, run))
        else:
            step = [concatenated(step, run)]
            batches = list(full_rows(step[0], run))
        for batch in batches:
            with torch.autocast(device().type, torch.bfloat16, enabled=run.trainer.precision == "bf16-mixed"):
                loss = model(**{key: value.to(device()) for key, value in batch.items()}).loss
            (loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return step_work(ours, step)

    return turn


def peer_encoder(run: Run, lengths: list[int]) -> Turn:
    """Prepare a turn that encodes random documents of these lengths in one padded batch."""
    dtype = torch.bfloat16 if run.trainer.precision == "bf16-mixed" else torch.float32
    ours = build_objectives(run).masked_lm
    documents = torch.randint(ours.backbone.vocab_size, (sum(lengths),), device=device()).split(lengths)
    model = transformers_model(ours).base_model.to(device(), dtype).eval()
    rows = pad_sequence(list(documents), True)
    mask = pad_sequence([torch.ones_like(document) for document in documents], True)

    def turn(number: int) -> StepWork:
        with torch.inference_mode():
            model(input_ids=rows, attention_mask=mask)
        return StepWork(sum(lengths), 0.0)

    return turn


def padded(step: list[MicroBatch], run: Run) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of as many documents as a micro-batch has rows, padded to the longest document.

    MEGA's batches are padded further, to whole chunks, as transformers' implementation requires.
    """
    at_once = max(1, run.trainer.micro_batch_tokens // run.phases["decay"].seq_len)
    chunk = run.backbone.get("chunk_size", 1)
    documents = []
    for batch in (batch.unpadded() for batch in step):
        lengths = batch.cu_seqlens.diff().tolist()
        documents += zip(batch.input_ids.split(lengths), _labels(batch).split(lengths), strict=True)
    for first in range(0, len(documents), at_once):
        columns = zip(*((ids, torch.ones_like(ids), labels) for ids, labels in documents[first : first + at_once]), strict=True)
        rows = {key: pad_sequence(list(column), True, FILL[key]) for key, column in zip(FILL, columns, strict=True)}
        longest = rows["input_ids"].shape[1]
        more = -longest % chunk if longest > chunk else 0
        yield {key: pad(row, (0, more), value=FILL[key]) for key, row in rows.items()}


def concatenated(step: list[MicroBatch], run: Run) -> MicroBatch:
    """Return all documents of a step as one sequence of whole rows, the last one filled up with the first tokens again.

    For a compiled model the last micro-batch is filled up as well, so that all have one shape.
    """
    length = run.phases["decay"].seq_len
    step = [batch.unpadded() for batch in step]
    labels = torch.cat([_labels(batch) for batch in step])
    ids = torch.cat([batch.input_ids for batch in step])
    at_once = min(run.trainer.micro_batch_tokens // length, -(-len(ids) // length)) if is_compiled(run) else 1
    more = -len(ids) % (length * at_once)
    ids, labels = torch.cat((ids, ids[:more])), torch.cat((labels, labels[:more]))
    positions = (labels >= 0).nonzero().flatten()
    ends = torch.arange(0, len(ids) + 1, length)
    return replace(
        step[0], input_ids=ids, cu_seqlens=ends, max_seqlen=length, target_positions=positions, targets=labels[positions],
        num_tokens=len(ids),
    )  # fmt: skip


def full_rows(batch: MicroBatch, run: Run) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of as many full rows as a micro-batch has; documents in a row attend to each other."""
    at_once = max(1, run.trainer.micro_batch_tokens // batch.max_seqlen)
    columns = (column.view(-1, batch.max_seqlen).split(at_once) for column in (batch.input_ids, _labels(batch)))
    for ids, labels in zip(*columns, strict=True):
        yield {"input_ids": ids, "labels": labels}


def _labels(batch: MicroBatch) -> torch.Tensor:
    return torch.full_like(batch.input_ids, FILL["labels"]).index_copy(0, batch.target_positions, batch.targets)
