"""Write a trained model as a Hugging Face folder, and compare its logits before the folder gets its name."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from modernenc.hugging_face import MASKED_LM, MULTIPLE_CHOICE, choice_model_of, converter_of, model_of
from modernenc.hugging_face.onnx_model import check_supported, write_onnx
from modernenc.hugging_face.parity import TOLERANCE, logit_difference, score_difference
from modernenc.hugging_face.sentence_folder import add_pooling
from modernenc.hugging_face.tokenizer import pretrained_tokenizer
from modernenc.model.card import CARD, card
from modernenc.model.load import choice_of, masked_lm_of, small_corpus
from modernenc.run_folder import checkpoints
from modernenc.run_folder.averaging import KINDS, average
from modernenc.run_folder.load import locate


def export(
    paths: Sequence[Path],
    out: Path,
    average_by: str | None = None,
    across_runs: bool = False,
    task: str | None = None,
    *,
    bf16: bool = False,
    onnx: bool = False,
    pooling: str | None = None,
    normalize: bool = False,
    name: str = "",
    revision: str = "",
) -> float:
    """Write `out` and return the largest difference of logits, relative to the largest logit or to 1.

    The model has the head of masked LM, or that of a multiple-choice task. `bf16` rounds its weights after the comparison,
    `onnx` adds it as ONNX, and `pooling` what makes the folder one of sentence-transformers, whose vectors `normalize` divides
    by their length. The model card shows how to load the model as `name`, by default the folder's, at a `revision`, by default
    none. Raises ValueError if `out` exists, if a checkpoint is not whole, if there are several without a known `average_by`, if
    there is no such task, if the logits differ by more than `TOLERANCE`, or if what is added cannot be made.
    """
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder or delete it")
    if task and (onnx or pooling):
        raise ValueError(f"--task {task}: --onnx and --pooling are for the model without the head of a task; export it apart")
    if (len(paths) > 1) != bool(average_by):
        named = ", ".join(map(str, paths))
        raise ValueError(f"{named}: one checkpoint, or several and --average {'|'.join(sorted(KINDS))}, make a model")
    runs, files = zip(*map(locate, paths), strict=True)
    if None in files:
        raise FileNotFoundError(f"{paths[files.index(None)]} holds no checkpoint yet: nothing to export")
    corpus = small_corpus(runs[0])
    trained = average(list(files), average_by, across_runs) if average_by else checkpoints.read(files[0])
    objective = masked_lm_of(trained, files[-1])
    roles = corpus.roles
    special_ids = {
        "pad_token_id": roles.pad, "cls_token_id": roles.cls, "sep_token_id": roles.sep, "bos_token_id": roles.cls,
        "eos_token_id": roles.sep,
    }  # fmt: skip
    choice = choice_of(trained, objective, task, files[-1]) if task else None
    model = choice_model_of(objective, choice, **special_ids) if choice else model_of(objective, **special_ids)
    if onnx:
        check_supported(model)
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial)
        pretrained_tokenizer(corpus, objective.backbone.max_position).save_pretrained(partial)
        loaded: Any = converter_of(objective.backbone).load(partial, MULTIPLE_CHOICE if choice else MASKED_LM)
        if choice:
            difference = score_difference(objective.backbone, choice, loaded, corpus.vocab_size)
        else:
            difference = logit_difference(objective, loaded, corpus.vocab_size)
        if not difference <= TOLERANCE:  # which a difference that is no number is not either
            raise ValueError(f"{out}: its logits would differ from the checkpoint's by {difference:.1e}; not exported")
        if onnx:
            write_onnx(loaded, partial)
        if bf16:
            loaded.to(torch.bfloat16).save_pretrained(partial)
        if pooling:
            add_pooling(partial, pooling, normalize, objective.backbone.max_position)
        described = card(
            name or out.name, objective, trained, Path(runs[0].run_dir), corpus, runs_code=any(partial.glob("*.py")),
            revision=revision, task=task or "", averaged=average_by or "", checkpoints=", ".join(file.stem for file in files),
        )  # fmt: skip
        (partial / CARD).write_text(described, encoding="utf-8")
        for path in filter(Path.is_file, partial.rglob("*")):  # safetensors lets its owner alone read what it writes
            shutil.copymode(partial / CARD, path)
        os.replace(partial, out)
    except SafetensorError as error:
        raise OSError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference
