"""Speed beside peers and the machine's limit: `python -m modernenc.bench [PART ...] [KEY=VALUE ...]`.

step: a training step beside transformers', by backbone and length. growth: time and memory against the length. inference:
hidden states beside transformers'. data: the way from shards to masked batches, beside others. loop: what the framework costs
over a bare loop. time_to_loss: minutes to a validation loss, beside transformers' Trainer. gpu: what a GPU does, cell by cell.
Tables, JSON and plots go to the folder `out`. Real documents are read from the corpus in `root`; data_prep makes one.
"""

import sys
from importlib import import_module
from pathlib import Path

from modernenc.bench.settings import Bench, register_bench
from modernenc.bench.step import PEERS
from modernenc.cli import run as run_cli

PARTS = ("step", "growth", "inference", "data", "loop", "time_to_loss", "roofline", "gpu")


def main(bench: Bench) -> None:
    """Measure the parts that are asked for."""
    for key, asked, there in (("parts", bench.parts, PARTS), ("peers", bench.peers, PEERS)):
        unknown = [name for name in asked if name not in there]
        if unknown:
            raise ValueError(f"{key}={unknown[0]}: there is none; there are {', '.join(there)}")
    for part in bench.parts:
        import_module(f"modernenc.bench.{part}").measure(bench, Path(bench.out))


if __name__ == "__main__":
    register_bench()
    asked = [argument for argument in sys.argv[1:] if argument in PARTS]
    if asked:
        sys.argv[1:] = [f"parts=[{','.join(asked)}]", *(argument for argument in sys.argv[1:] if argument not in PARTS)]
    run_cli(Bench, (), "bench", main)
