"""Write a checkpoint, or an average of some, as a Hugging Face model: `python -m modernenc.export RUN_DIR|CKPT ... OUT`.

`OUT` gets config, safetensors and tokenizer, and its name only after a model loaded from it gave the same logits.
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from modernenc.averaging import KINDS, average
from modernenc.cli import one_line_errors


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

    from modernenc import checkpoints
    from modernenc.data.blocks import Corpus
    from modernenc.hugging_face import converter_of, model_of
    from modernenc.hugging_face.parity import TOLERANCE, logit_difference
    from modernenc.hugging_face.tokenizer import pretrained_tokenizer
    from modernenc.model import locate, masked_lm_of

    found = []
    for path in paths:
        run, checkpoint = locate(path)
        if checkpoint is None:
            raise FileNotFoundError(f"{path} holds no checkpoint yet: nothing to export")
        found.append((run, checkpoint))
    run, checkpoint = found[0]
    corpus = Corpus.of(run.data)
    content = average([path for _, path in found], average_by) if average_by else checkpoints.read(checkpoint)
    objective = masked_lm_of(run, content)
    roles = corpus.roles
    special_ids = {
        "pad_token_id": roles.pad, "cls_token_id": roles.cls, "sep_token_id": roles.sep, "bos_token_id": roles.cls,
        "eos_token_id": roles.sep,
    }  # fmt: skip
    model = model_of(objective, **special_ids)
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    converter_of(objective.backbone).save(model, unfinished)
    pretrained_tokenizer(corpus, run.backbone["max_position"]).save_pretrained(unfinished)
    loaded = AutoModelForMaskedLM.from_pretrained(unfinished, trust_remote_code=True)  # where there is code, it is ours
    difference = logit_difference(objective, loaded, corpus.vocab_size)
    if difference > TOLERANCE:
        raise ValueError(f"{unfinished}: its logits differ from the checkpoint's by {difference:.1e}; not exported")
    os.replace(unfinished, out)
    return difference


if __name__ == "__main__":
    main()
