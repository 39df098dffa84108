"""Settings of the benchmarks, and the runs that follow from them."""

from dataclasses import dataclass, field
from typing import Any

import hydra
from omegaconf import MISSING, OmegaConf, open_dict

from modernenc.cli import hydra_options, to_schema
from modernenc.config import Data, Run
from modernenc.data.blocks import Corpus
from modernenc.planning.resolve import resolve

PARTS = ("step", "inference", "data", "loop", "time_to_loss", "roofline", "gpu")
PEERS = {"padded": "HF padded", "rows": "HF full rows"}
"""Names of transformers' ways to batch documents, and how tables show them."""


@dataclass
class Gpu:
    """Settings of part gpu. Keys of `Bench` that also stand here apply to the other parts only."""

    cells: list[str] = MISSING
    """Prefixes of the names of the cells to measure; an empty list means all."""
    seconds: float = MISSING
    """Time budget for all cells; a cell whose limit exceeds the time left is not started."""
    backbone: str = MISSING
    """Backbone of most cells."""
    lengths: list[int] = MISSING
    """Two row lengths in tokens: that of most cells, and a long one."""
    others: dict[str, int] = MISSING
    """More backbones whose step is measured, each with its row length."""
    step_tokens: int = MISSING
    micro_batch_tokens: int = MISSING
    repetitions: int = MISSING
    """Measured turns of each candidate, after one warm-up turn."""
    matrix_size: int = MISSING
    """Rows and columns of the matrices whose products and copies show the card's limits."""
    run_steps: int = MISSING
    """Steps of a whole run, which is saved five times; at least 25."""


@dataclass
class Recipe:
    """A recipe that is held against transformers' Trainer."""

    recipe: str = MISSING
    """Name in `recipes`. Its phases are scaled, and read the benchmark's corpus."""
    share: float = MISSING
    """Fraction of the Trainer's tokens that it gets."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings to change, by key as on the command line."""


@dataclass
class TimeToLoss:
    """Settings of part time_to_loss."""

    tokens: list[float] = MISSING
    """Budgets of transformers' Trainer in tokens, each a comparison of its own."""
    seeds: int = MISSING
    """Trainings of each recipe, and of the Trainer's best settings."""
    trainer_lrs: list[float] = MISSING
    """Learning rates of the Trainer, the best of which counts."""
    trainer_rows: list[int] = MISSING
    """Rows of 512 in a step of the Trainer, the best of which counts."""
    recipes: dict[str, Recipe] = MISSING
    """Our candidates by name. `~time_to_loss.recipes.NAME` leaves one out."""
    validation_tokens: int = MISSING
    """Held-out tokens of each source for the validation loss; at least a row of 512."""
    keep_models: bool = MISSING
    """Whether to keep the model of each training as a Hugging Face folder, to evaluate."""


@dataclass
class Bench:
    """Settings of `python -m modernenc.bench`, with values in `conf/bench.yaml`."""

    parts: list[str] = MISSING
    """Parts to measure, in this order; `--help` lists them."""
    root: str = MISSING
    """Folder of block shards that `python -m data_prep` wrote. Sources are mixed in proportion to their tokens."""
    out: str = MISSING
    """Folder for tables and JSON."""
    backbones: list[str] = MISSING
    """Names in `conf/backbone`."""
    peers: list[str] = MISSING
    """How transformers' model gets its documents: padded, rows (full rows), or an empty list for no comparison."""
    lengths: list[int] = MISSING
    """Row lengths in tokens; longer documents are cut."""
    num_hidden_layers: int = MISSING
    """Number of layers in place of the backbone's own; 0 keeps it."""
    step_tokens: int = MISSING
    """Approximate tokens of an optimizer step, at least one row."""
    micro_batch_tokens: int = MISSING
    """Tokens of a micro-batch, padding included, at least one row."""
    repetitions: int = MISSING
    """Measured turns of each candidate, after one warm-up turn."""
    inference_tokens: int = MISSING
    """Tokens of an inference batch whose documents all have full length; a batch has at least four documents."""
    time_to_loss: TimeToLoss = field(default_factory=TimeToLoss)
    gpu: Gpu = field(default_factory=Gpu)


def check(bench: Bench) -> None:
    """Raise ValueError or FileNotFoundError for settings that no part can run with, before torch is imported."""
    backbones = sorted(hydra_options("backbone"))
    for key, names, known in (
        ("parts", bench.parts, PARTS),
        ("peers", bench.peers, PEERS),
        ("backbones", bench.backbones, backbones),
        ("gpu.backbone", [bench.gpu.backbone], backbones),
        ("gpu.others", bench.gpu.others, backbones),
        ("time_to_loss.recipes", [one.recipe for one in bench.time_to_loss.recipes.values()], sorted(hydra_options("recipe"))),
    ):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{key}={unknown[0]} is unknown; available: {', '.join(known)}")
    for name, recipe in bench.time_to_loss.recipes.items():
        if not 0 < recipe.share <= 1:
            raise ValueError(f"time_to_loss.recipes.{name}.share={recipe.share}: expected a fraction of the Trainer's tokens")
    if len(bench.gpu.lengths) != 2:
        raise ValueError(f"gpu.lengths={bench.gpu.lengths}: expected two, that of most rows and that of long ones")
    if bench.gpu.run_steps < 25:
        raise ValueError(f"gpu.run_steps={bench.gpu.run_steps}: expected at least 25, for five saves and steps far from them")
    make_run(bench, bench.gpu.backbone, bench.gpu.lengths[0])  # the corpus is there


def mix_of(bench: Bench) -> dict[str, float]:
    """Return the tokens of each source of the corpus, in proportion to which all benchmarks read it."""
    hint = f"prepare it with: python -m data_prep +corpus=demo out={bench.root}"
    sources = Corpus.of(Data(root=bench.root, hint=hint)).sources
    return {name: float(sum(part["tokens"] for part in entry["slices"].values())) for name, entry in sources.items()}


def make_run(bench: Bench, backbone: str, length: int, optimizer: str = "adamw", changes: dict[str, Any] | None = None) -> Run:
    """Return a run with the single phase `decay`, which trains in rows of `length` tokens on the benchmark's documents.

    `changes` are further settings by key.
    """
    cfg = hydra.compose("train", ["+recipe=demo", f"backbone={backbone}", f"optim={optimizer}"])
    batch_rows = max(1, bench.step_tokens // length)
    settings = {
        "recipe": "bench", "run_dir": "", "data.root": bench.root, "data.lanes": 1, "data.workers": 0,
        "trainer.micro_batch_tokens": max(length, bench.micro_batch_tokens),
        "backbone.max_position": max(length, cfg.backbone.max_position),
        "backbone.num_hidden_layers": bench.num_hidden_layers or cfg.backbone.num_hidden_layers,
        "phases.decay.seq_len": length, "phases.decay.batch_rows": batch_rows,
        "phases.decay.tokens": (bench.repetitions + 1) * batch_rows * length,
        "phases.decay.mix": mix_of(bench),
        **(changes or {}),
    }  # fmt: skip
    with open_dict(cfg):
        cfg.phases = {"decay": cfg.phases.decay}
        for key, value in settings.items():
            OmegaConf.update(cfg, key, value, merge=False)
    return resolve(to_schema(cfg, Run, ()))
