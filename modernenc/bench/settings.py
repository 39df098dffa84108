"""What a benchmark is asked to measure, and the runs that follow from it."""

from dataclasses import dataclass, field
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, open_dict

from modernenc.cli import hydra_options, typed
from modernenc.config import Run, register
from modernenc.planning.sizes import choose_sizes


@dataclass
class Gpu:
    """What part gpu measures; of keys that are here, those further down are for the other parts."""

    cells: list[str] = MISSING
    """How the names of cells begin that are measured; all are if there are none here."""
    seconds: float = MISSING
    """For all cells: one whose limit no longer fits is not begun."""
    backbone: str = MISSING
    """That of most cells."""
    lengths: list[int] = MISSING
    """Two: tokens of most rows, and of long ones."""
    others: dict[str, int] = MISSING
    """Backbones whose step is measured too, each at its length."""
    step_tokens: int = MISSING
    micro_batch_tokens: int = MISSING
    repetitions: int = MISSING
    """Turns that are measured of each, after one to warm up."""
    matrix_size: int = MISSING
    """Rows and columns of the products and copies that tell what the card can do."""
    run_steps: int = MISSING
    """Steps of a whole run, which is saved five times; 25 at least."""


@dataclass
class Bench:
    """Settings of `python -m modernenc.bench`, by `conf/bench.yaml`."""

    parts: list[str] = MISSING
    """What to measure, one after the other: what `--help` lists."""
    root: str = MISSING
    """Folder of block shards that `python -m data_prep` wrote, whose documents are read in shares of their tokens."""
    out: str = MISSING
    """Folder for tables, JSON and plots."""
    backbones: list[str] = MISSING
    """Names in `conf/backbone`."""
    peers: list[str] = MISSING
    """transformers' model with documents padded, as full rows, or not at all: padded, rows."""
    lengths: list[int] = MISSING
    """Tokens of a row: what documents are cut to."""
    num_hidden_layers: int = MISSING
    """Layers in place of a backbone's own; 0 leaves it as it is."""
    step_tokens: int = MISSING
    """Tokens of an optimizer step, about; a row at least."""
    micro_batch_tokens: int = MISSING
    """Tokens that are trained on at a time, padding included; a row at least."""
    mask_ratio: float = MISSING
    """Share of the tokens that is predicted."""
    precision: str = MISSING
    """As trainer.precision."""
    repetitions: int = MISSING
    """Steps that are measured of each, after one to warm up."""
    inference_tokens: int = MISSING
    """Tokens of a batch of documents of full length, in inference; at least four documents."""
    lanes: int = MISSING
    """As data.lanes, where we train to a loss; each source needs as many blocks."""
    validation_tokens: int = MISSING
    """Held-out tokens of each source that tell the loss; a row of 512 at least."""
    trainer_tokens: float = MISSING
    """What transformers' Trainer learns from before it counts as trained."""
    trainer_lrs: list[float] = MISSING
    """Its learning rates, of which the best counts."""
    gpu: Gpu = field(default_factory=Gpu)
    optimizers: dict[str, dict[str, Any]] = MISSING
    """What we train with beside it, by names in `conf/optim`: their settings, and `share`, that of its tokens which ours gets;
    `~optimizers.muon` leaves that one out."""


def register_bench() -> None:
    """Make the schemas known to Hydra."""
    register()
    ConfigStore.instance().store(name="bench_schema", node=Bench)


def the_run(bench: Bench, backbone: str, length: int, optimizer: str = "adamw") -> Run:
    """A run of one phase on the benchmark's documents; ValueError for what there is not."""
    for key, group, name in (("backbones", "backbone", backbone), ("optimizers", "optim", optimizer)):
        if name not in hydra_options(group):
            raise ValueError(f"{key}={name}: there is none; there are {', '.join(sorted(hydra_options(group)))}")
    from modernenc.data.blocks import Corpus

    cfg = hydra.compose("train", ["+recipe=demo", f"backbone={backbone}", f"optim={optimizer}"])
    with open_dict(cfg):
        cfg["recipe"], cfg["run_dir"] = "bench", ""
    run = typed(cfg, Run, ())
    run.data.root, run.data.lanes, run.data.workers = bench.root, 1, 0
    run.trainer.precision = bench.precision
    run.trainer.micro_batch_tokens = max(length, bench.micro_batch_tokens)
    run.backbone["max_position"] = max(length, run.backbone["max_position"])
    run.backbone["num_hidden_layers"] = bench.num_hidden_layers or run.backbone["num_hidden_layers"]
    phase = run.phases["decay"]
    phase.seq_len, phase.batch_rows, phase.mask_ratio = length, max(1, bench.step_tokens // length), bench.mask_ratio
    phase.tokens = (bench.repetitions + 1) * phase.batch_rows * length
    sources = Corpus.of(run.data).sources
    phase.mix = {name: sum(part["tokens"] for part in source["slices"].values()) for name, source in sources.items()}
    run.phases = {"decay": phase}
    choose_sizes(run)
    return run
