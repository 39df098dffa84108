"""Write a checkpoint, or an average of several, as a Hugging Face model: `python -m modernenc.export RUN_DIR|CKPT ... OUT`.

`OUT` holds config, safetensors, tokenizer and model card. It gets its name only after a model loaded from it has given the same
logits.
"""

import argparse
from pathlib import Path

from modernenc.cli import one_line_errors, take_allowed_code


def main() -> None:
    """Export what the command line names."""
    take_allowed_code()
    parser = argparse.ArgumentParser(
        prog="python -m modernenc.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="path", help="run folder (its newest checkpoint is taken), or a checkpoint"
    )
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--average", help="how several checkpoints of one run are averaged: exponential, one_minus_sqrt, uniform"
    )
    parser.add_argument("--task", help="a multiple-choice task of the run, whose head is exported in place of masked LM's")
    parser.add_argument("--bf16", action="store_true", help="round the weights to bf16: half of the size")
    parser.add_argument("--onnx", action="store_true", help="also write it as ONNX, in fp32 and with weights in int8")
    parser.add_argument("--pooling", choices=["mean", "cls"], help="make the folder one of sentence-transformers too")
    parser.add_argument("--normalize", action="store_true", help="with --pooling: vectors of length 1")
    parser.add_argument("--across-runs", action="store_true", help="average checkpoints of runs that began apart")
    arguments = parser.parse_args()
    with one_line_errors():
        from modernenc.model.export import export  # torch and transformers take seconds to import

        if arguments.normalize and not arguments.pooling:
            raise ValueError("--normalize: there are vectors to normalize only with --pooling")
        difference = export(
            arguments.paths, arguments.out, arguments.average, arguments.across_runs, arguments.task,
            bf16=arguments.bf16, onnx=arguments.onnx, pooling=arguments.pooling, normalize=arguments.normalize,
        )  # fmt: skip
        rounded = ", before its weights were rounded to bf16" if arguments.bf16 else ""
        print(f"{arguments.out} is ready: logits differ by at most {difference:.1e} from the checkpoint's{rounded}")


if __name__ == "__main__":
    main()
