"""Compare speed with other libraries and with hardware limits: `python -m modernenc.bench [PART ...] [KEY=VALUE ...]`.

step: a training step beside transformers', by backbone and length. inference: hidden states beside transformers'. data: from
shards to masked batches. loop: the framework's overhead over a bare PyTorch loop. time_to_loss: minutes
to a validation loss, beside transformers' Trainer. roofline: kernels, FLOPs and bytes of a step on a GPU, counted without one.
gpu: what a GPU does, cell by cell.
Tables and JSON go to the folder `out`. Real documents are read from the corpus in `root`, which data_prep writes.
"""

import sys
from importlib import import_module
from pathlib import Path

from rich.console import Console

from modernenc.bench.settings import PARTS, Bench, check
from modernenc.cli import run as run_cli
from modernenc.config import register


def main(bench: Bench) -> None:
    """Run the chosen parts; only they import torch and what they compare with."""
    check(bench)
    for part in bench.parts:
        if output := import_module(f"modernenc.bench.{part}").measure(bench, Path(bench.out)):
            Console().print(output.table)


if __name__ == "__main__":
    register()
    if parts := [argument for argument in sys.argv[1:] if argument in PARTS]:
        sys.argv[1:] = [f"parts=[{','.join(parts)}]", *(argument for argument in sys.argv[1:] if argument not in PARTS)]
    run_cli(Bench, (), "bench", main)
