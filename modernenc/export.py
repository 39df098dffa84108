"""Write a checkpoint, or an average of some, as a Hugging Face model: `python -m modernenc.export RUN_DIR|CKPT ... OUT`.

`OUT` gets config, safetensors and tokenizer, and its name only after a model loaded from it gave the same logits.
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modernenc.cli import one_line_errors
from modernenc.run_folder.averaging import KINDS, average

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit or to 1."""


def main() -> None:
    """Export what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m modernenc.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="path", help="run folder (its newest checkpoint is taken), or a checkpoint"
    )
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--average", choices=sorted(KINDS), help="how several checkpoints of one run are averaged")
    arguments = parser.parse_args()
    with one_line_errors():
        difference = export(arguments.paths, arguments.out, arguments.average)
        print(f"{arguments.out} is ready: logits differ by at most {difference:.1e} from the checkpoint's")


def export(paths: Sequence[Path], out: Path, average_by: str | None = None) -> float:
    """Write `out`; the largest difference of logits, relative to the largest logit or to 1.

    Raises ValueError when `out` exists, when a checkpoint is not whole, when there are several and it is not said how they are
    averaged, or when the logits differ by more than `TOLERANCE`.
    """
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder or delete it")
    if (len(paths) > 1) != bool(average_by):
        named = ", ".join(map(str, paths))
        raise ValueError(f"{named}: one checkpoint, or several and --average {'|'.join(sorted(KINDS))}, make a model")

    from transformers import AutoModelForMaskedLM

    from modernenc.data.blocks import Corpus
    from modernenc.model.load import masked_lm_of
    from modernenc.run_folder import checkpoints
    from modernenc.run_folder.load import locate

    found = []
    for path in paths:
        run, checkpoint = locate(path)
        if checkpoint is None:
            raise FileNotFoundError(f"{path} holds no checkpoint yet: nothing to export")
        found.append((run, checkpoint))
    run, checkpoint = found[0]
    corpus = Corpus.of(run.data)
    trained = average([path for _, path in found], average_by) if average_by else checkpoints.read(checkpoint)
    objective = masked_lm_of(run, trained)
    roles = corpus.roles
    model = objective.backbone.hugging_face_model(
        pad_token_id=roles.pad, cls_token_id=roles.cls, sep_token_id=roles.sep, bos_token_id=roles.cls, eos_token_id=roles.sep
    )
    model.load_state_dict(hugging_face_names(objective.state_dict(), objective.backbone.HUGGING_FACE_NAMES))
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    model.save_pretrained(unfinished)
    hugging_face_tokenizer(corpus, run.backbone["max_position"]).save_pretrained(unfinished)
    loaded = AutoModelForMaskedLM.from_pretrained(unfinished, trust_remote_code=True)  # where there is code, it is ours
    difference = compare(objective, loaded, corpus.vocab_size)
    if difference > TOLERANCE:
        raise ValueError(f"{unfinished}: its logits differ from the checkpoint's by {difference:.1e}; not exported")
    os.replace(unfinished, out)
    return difference


def hugging_face_names(weights: dict[str, Any], beginnings: dict[str, str]) -> dict[str, Any]:
    """Weights by other names: what they begin with replaced as `Backbone.HUGGING_FACE_NAMES` says."""

    def renamed(name: str) -> str:
        ours = next((ours for ours in beginnings if name.startswith(ours)), "")
        return beginnings.get(ours, "") + name[len(ours) :]

    return {renamed(name): value for name, value in weights.items()}


def our_names(weights: dict[str, Any], beginnings: dict[str, str]) -> dict[str, Any]:
    """transformers' names of weights -> ours."""
    return hugging_face_names(weights, {theirs: ours for ours, theirs in beginnings.items()})


def compare(objective: Any, model: Any, vocab_size: int) -> float:
    """Largest difference of logits on random documents of many lengths, relative to the largest logit or to 1."""
    import torch

    longest = min(700, objective.backbone.max_position)
    lengths = [n for n in (1, 2, 31, 64, 65, 129, 300, longest) if n <= longest]
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    difference = largest = 0.0
    with torch.no_grad():
        ours = objective.logits(torch.cat(documents), ends, max(lengths), torch.arange(int(ends[-1])))
        for document, start, end in zip(documents, ends[:-1], ends[1:], strict=True):
            theirs = model.eval()(input_ids=document[None]).logits[0]
            difference = max(difference, float((theirs - ours[start:end]).abs().max()))
            largest = max(largest, float(theirs.abs().max()))
    return difference / max(1.0, largest)


def hugging_face_tokenizer(corpus: Any, max_position: int) -> Any:
    """The corpus's tokenizer, which adds cls and sep."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    tokenizer.no_truncation()  # a given one may be set to cut texts, which transformers alone would not heed
    tokenizer.no_padding()
    names = {role: tokenizer.id_to_token(number) for role, number in vars(corpus.roles).items()}
    cls, sep = names["cls"], names["sep"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(cls, corpus.roles.cls), (sep, corpus.roles.sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_position,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{role}_token": name for role, name in names.items()},
    )


if __name__ == "__main__":
    main()
