"""Speed beside peers and the machine's limit: `python -m modernenc.bench [parts=[step,growth,data]] [KEY=VALUE ...]`.

step: a training step beside transformers', by backbone and length. growth: time and memory against the length. data: the way
from shards to masked batches, beside others.
Tables, JSON and plots go to the folder `out`. Real documents are read from the corpus in `root`; data_prep makes one.
"""

from pathlib import Path

from modernenc.bench.settings import Bench, register_bench
from modernenc.cli import run as run_cli

PARTS = ("step", "growth", "data")


def main(bench: Bench) -> None:
    """Measure the parts that are asked for."""
    unknown = [part for part in bench.parts if part not in PARTS]
    if unknown:
        raise ValueError(f"parts={unknown[0]}: there is none; there are {', '.join(PARTS)}")
    from modernenc.bench import data, growth, step

    for part in bench.parts:
        {"step": step, "growth": growth, "data": data}[part].measure(bench, Path(bench.out))


if __name__ == "__main__":
    register_bench()
    run_cli(Bench, (), "bench", main)
