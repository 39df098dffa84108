"""transformers' candidates, with sdpa attention: a training step and an encoder, and the batches that they take."""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from hydra.utils import get_class
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForMaskedLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from modernenc.bench.interleave import StepWork, Turn, device
from modernenc.bench.ours import LR, load_steps, step_work
from modernenc.config import Run
from modernenc.data.loader import Step
from modernenc.hugging_face import converter_of
from modernenc.model.build import build_objectives, compiles
from modernenc.objectives.masked_lm import MaskedLM

PADDING = {"input_ids": 0, "labels": -100, "attention_mask": 0}


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
    steps = list(load_steps(run))
    ours = build_objectives(run).masked_lm
    model = transformers_model(ours).to(device()).train()
    model.sparse_prediction = sparse
    if compiles(run.trainer, device()):
        model.compile(dynamic=None if sparse else batching == "padded")
    optimizer = torch.optim.AdamW(model.parameters(), LR, fused=True)

    def turn(number: int) -> StepWork:
        batches = list((pad_documents if batching == "padded" else fill_rows)(steps[number], run))
        for batch in batches:
            with torch.autocast(device().type, torch.bfloat16):
                loss = model(**{key: value.to(device()) for key, value in batch.items()}).loss
            (loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
        lengths = [length for mask in masks for length in mask.sum(1).tolist()]
        return step_work(ours, lengths, sum(int((batch["labels"] >= 0).sum()) for batch in batches))

    return turn


def peer_encoder(run: Run, lengths: list[int]) -> Turn:
    """Prepare a turn that encodes random documents of these lengths in one padded batch."""
    ours = build_objectives(run).masked_lm
    documents = torch.randint(ours.backbone.vocab_size, (sum(lengths),), device=device()).split(lengths)
    model = transformers_model(ours).base_model.to(device(), torch.bfloat16).eval()
    rows = pad_sequence(list(documents), True)
    mask = pad_sequence([torch.ones_like(document) for document in documents], True)

    def turn(number: int) -> StepWork:
        with torch.inference_mode():
            model(input_ids=rows, attention_mask=mask)
        return StepWork(sum(lengths), 0.0)

    return turn


def pad_documents(step: Step, run: Run) -> Iterator[dict[str, Tensor]]:
    """Yield batches of as many documents as a micro-batch has rows, padded to the longest document.

    MEGA's batches are padded further, to whole chunks, as transformers' implementation requires.
    """
    at_once, chunk = _rows_at_once(run), run.backbone.get("chunk_size", 1)
    documents = [(ids, labels, torch.ones_like(ids)) for ids, labels in _documents(step)]
    for first in range(0, len(documents), at_once):
        columns = zip(*documents[first : first + at_once], strict=True)
        rows = {key: pad_sequence(list(column), True, PADDING[key]) for key, column in zip(PADDING, columns, strict=True)}
        longest = rows["input_ids"].shape[1]
        more = -longest % chunk if longest > chunk else 0
        yield {key: pad(row, (0, more), value=PADDING[key]) for key, row in rows.items()}


def fill_rows(step: Step, run: Run) -> Iterator[dict[str, Tensor]]:
    """Yield batches of as many full rows as a micro-batch has; documents in a row attend to each other.

    The last row is filled up with the first tokens again, and so is the last batch for a compiled model, so that all have one
    shape.
    """
    ids, labels = (torch.cat(column) for column in zip(*_documents(step), strict=True))
    length, at_once = run.phases["decay"].seq_len, _rows_at_once(run)
    more = -len(ids) % (length * (min(at_once, -(-len(ids) // length)) if compiles(run.trainer, device()) else 1))
    columns = (torch.cat((column, column[:more])).view(-1, length).split(at_once) for column in (ids, labels))
    for ids, labels in zip(*columns, strict=True):
        yield {"input_ids": ids, "labels": labels}


def _documents(step: Step) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the ids and labels of each document of a step; the label of a token that is not predicted is -100."""
    for batch in (batch.unpadded() for batch in step.micro_batches):
        labels = torch.full_like(batch.input_ids, PADDING["labels"]).index_copy(0, batch.target_positions, batch.targets)
        lengths = batch.cu_seqlens.diff().tolist()
        yield from zip(batch.input_ids.split(lengths), labels.split(lengths), strict=True)


def _rows_at_once(run: Run) -> int:
    return max(1, run.trainer.micro_batch_tokens // run.phases["decay"].seq_len)
