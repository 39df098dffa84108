"""Compare what it costs to learn with transformers' Trainer: seconds, tokens and FLOPs to the loss where the Trainer ends.

The Trainer trains with every learning rate and batch of a grid, with one seed; the two that end lowest train with all seeds,
and the one whose mean is lower is what the recipes are held against: its mean final loss is the target. Each recipe trains with
all seeds, on `share` of the Trainer's tokens.

A training is a cell: a file that is written when it is over, and not made again. So a comparison of hours may be stopped and
goes on, and one more candidate costs its own trainings only. Times are of one machine, which should do nothing else: on another
one all is trained again.
"""

import json
import multiprocessing
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import hydra
import matplotlib
import xxhash
from matplotlib import pyplot
from omegaconf import open_dict

from modernenc.atomic import write_json
from modernenc.bench.output import Output
from modernenc.bench.peers import check_peer
from modernenc.bench.settings import Bench, make_run, mix_of
from modernenc.bench.trainings import POINTS, ROW, WHOLE_DOCUMENT, Training, train_ours, train_theirs
from modernenc.cli import to_schema
from modernenc.config import Data, Run
from modernenc.data.blocks import Corpus
from modernenc.evaluation.intervals import half_interval
from modernenc.planning.resolve import resolve
from modernenc.run_folder.lineage import versions

FORMAT = 1
"""Number of the meaning of a training's file; one of another is not read."""
FINALISTS = 2
"""Settings of the Trainer that train with all seeds."""
TRAINER = "Trainer"
AXES = {"seconds": "time", "tokens": "tokens", "flops": "FLOPs"}
"""What is compared, by its name in a training."""


@dataclass
class Candidate:
    """A way to train, and its trainings by seed."""

    name: str
    trainings: dict[int, Training]

    @property
    def loss(self) -> float:
        """Mean loss at the end."""
        return mean(training.losses[-1] for training in self.trainings.values())


def measure(bench: Bench, folder: Path) -> Output:
    """Train with every backbone and budget, and compare."""
    if not find_spec("accelerate"):
        raise ValueError("parts=time_to_loss: transformers' Trainer needs accelerate; pip install 'modernenc[bench]'")
    title = "cost of the loss where the Trainer ends at its best, as a share of the Trainer's"
    output = Output(folder, "time_to_loss", title, "ends at", *AXES.values(), "seeds")
    for backbone, tokens in product(bench.backbones, bench.time_to_loss.tokens):
        check_peer(backbone, make_run(bench, backbone, ROW))
        peer = _best_of_the_trainer(bench, folder, backbone, int(tokens))
        ours = [_recipe(bench, folder, backbone, int(tokens), name) for name in bench.time_to_loss.recipes]
        spent = {axis: mean(getattr(training, axis)[-1] for training in peer.trainings.values()) for axis in AXES}
        output.table.add_row(f"{backbone}, {tokens:,.0f} tokens: {peer.loss:.3f} nat")
        ends = _with_interval([training.losses[-1] for training in peer.trainings.values()])
        output.table.add_row(f"  {peer.name}", ends, "1", "1", "1", str(len(peer.trainings)))
        for candidate in ours:
            output.table.add_row(f"  {candidate.name}", *_row(candidate, peer.loss, spent))
        all_of = {one.name: {seed: asdict(training) for seed, training in one.trainings.items()} for one in (peer, *ours)}
        output.add(backbone=backbone, tokens=tokens, target=peer.loss, trainings=all_of)
        _draw(folder / f"time_to_loss-{backbone}-{int(tokens)}.png", peer, ours)
    return output


def _best_of_the_trainer(bench: Bench, folder: Path, backbone: str, tokens: int) -> Candidate:
    """Search the grid with the first seed, and return the best of the finalists with all."""
    settings = bench.time_to_loss
    found = []
    for lr, batch_rows in product(settings.trainer_lrs, settings.trainer_rows):
        name = f"{TRAINER}, {lr:g}, {batch_rows} rows"
        first = _train_theirs(bench, folder, backbone, tokens, lr, batch_rows, 0)
        found.append((Candidate(name, {0: first}), lr, batch_rows))
    found.sort(key=lambda one: one[0].loss)
    for candidate, lr, batch_rows in found[:FINALISTS]:
        for seed in range(1, settings.seeds):
            candidate.trainings[seed] = _train_theirs(bench, folder, backbone, tokens, lr, batch_rows, seed)
    return min((candidate for candidate, _, _ in found[:FINALISTS]), key=lambda candidate: candidate.loss)


def _train_theirs(bench: Bench, folder: Path, backbone: str, tokens: int, lr: float, batch_rows: int, seed: int) -> Training:
    documents = make_run(bench, backbone, WHOLE_DOCUMENT, changes={"phases.decay.tokens": 2 * tokens})
    identity = [TRAINER, documents.backbone, tokens, lr, batch_rows, seed]
    keep, name = bench.time_to_loss.keep_models, f"trainer-{lr:g}-{batch_rows}-{seed}"
    return _cell(
        folder, name, identity, bench, keep,
        lambda to: (train_theirs, documents, _validated(bench, backbone), lr, batch_rows, tokens, seed, to),
    )  # fmt: skip


def _recipe(bench: Bench, folder: Path, backbone: str, tokens: int, name: str) -> Candidate:
    candidate = Candidate(name, {})
    for seed in range(bench.time_to_loss.seeds):
        run = recipe_run(bench, backbone, tokens, name, seed)
        identity = [asdict(replace(run, data=replace(run.data, root="")))]
        candidate.trainings[seed] = _cell(
            folder, f"{name}-{seed}", identity, bench, bench.time_to_loss.keep_models,
            lambda to, run=run: (train_ours, run, _validated(bench, backbone), to),
        )  # fmt: skip
    return candidate


def recipe_run(bench: Bench, backbone: str, tokens: int, name: str, seed: int) -> Run:
    """Return a recipe on the benchmark's corpus, its phases scaled to a share of the Trainer's tokens."""
    recipe = bench.time_to_loss.recipes[name]
    overrides = [f"{key}={value}" for key, value in recipe.overrides.items()]
    cfg = hydra.compose("train", [f"+recipe={recipe.recipe}", f"backbone={backbone}", *overrides])
    with open_dict(cfg):
        cfg.recipe, cfg.run_dir = "bench", ""
    run = to_schema(cfg, Run, ())
    scale = recipe.share * tokens / sum(phase.tokens for phase in run.phases.values())
    mix = mix_of(bench)
    longest = max(ROW, *(phase.seq_len for phase in run.phases.values()))
    backbone_settings = {**run.backbone, "max_position": max(longest, run.backbone["max_position"])}
    if bench.num_hidden_layers:
        backbone_settings["num_hidden_layers"] = bench.num_hidden_layers
    phases = {
        key: replace(
            phase, tokens=round(scale * phase.tokens), warmup_tokens=round(scale * phase.warmup_tokens), mix=mix,
            ramp=replace(phase.ramp, tokens=round(scale * phase.ramp.tokens)),
        )
        for key, phase in run.phases.items()
    }  # fmt: skip
    return resolve(replace(
        run, seed=seed, backbone=backbone_settings, phases=phases,
        data=replace(run.data, root=bench.root, workers=0, lanes=0, buffer_rows=0),
        checkpoint=replace(run.checkpoint, every_tokens=0, every_minutes=0),
        validation=replace(run.validation, every_tokens=recipe.share * tokens // POINTS),
    ))  # fmt: skip


def _validated(bench: Bench, backbone: str) -> Run:
    """Return the run whose held-out rows and masks all trainings are validated on."""
    return make_run(bench, backbone, ROW, changes={"validation.tokens_per_source": bench.time_to_loss.validation_tokens})


def _cell(
    folder: Path, name: str, identity: list[Any], bench: Bench, keep: bool, work: Callable[[Path | None], tuple[Any, ...]]
) -> Training:
    """Return a training from its file, or train in a process of its own and write the file."""
    corpus = Corpus.of(Data(root=bench.root)).fingerprint([mix_of(bench)])
    settings = [FORMAT, platform.node(), identity, corpus, bench.time_to_loss.validation_tokens]
    digest = xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True).encode())
    path = folder / "trainings" / f"{name}-{digest}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        function, *arguments = work(path.with_suffix("") if keep else None)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            training = pool.submit(function, *arguments).result()
        write_json(path, {"training": asdict(training), "machine": platform.node(), "versions": versions()})
    training = Training(**json.loads(path.read_text())["training"])
    print(f"{name}: {training.losses[-1]:.3f} after {training.seconds[-1]:,.0f} s", flush=True)
    return training


def _row(candidate: Candidate, target: float, spent: dict[str, float]) -> list[str]:
    """Return the cells of a recipe: its loss, and its cost up to the target as a share of the Trainer's."""
    trainings = list(candidate.trainings.values())
    reached = [(training, number) for training in trainings if (number := training.reaches(target)) is not None]
    cells = [_with_interval([training.losses[-1] for training in trainings])]
    for axis, whole in spent.items():
        shares = [getattr(training, axis)[number] / whole for training, number in reached]
        cells.append(_with_interval(shares, 2) if len(reached) == len(trainings) else "never")
    return [*cells, str(len(trainings)) if len(reached) == len(trainings) else f"{len(reached)} of {len(trainings)}"]


def _with_interval(values: Sequence[float], digits: int = 3) -> str:
    return f"{mean(values):.{digits}f} ±{half_interval(values):.{digits}f}"


def _draw(path: Path, peer: Candidate, ours: Sequence[Candidate]) -> None:
    """Plot all losses over the time, with the target."""
    matplotlib.use("Agg")
    figure, axis = pyplot.subplots(figsize=(9, 5), constrained_layout=True)
    for number, candidate in enumerate((peer, *ours)):
        for training in candidate.trainings.values():
            label = candidate.name if training is next(iter(candidate.trainings.values())) else None
            colour = f"C{number - 1}" if number else "#888"
            axis.plot(training.seconds, training.losses, color=colour, linewidth=1.2, label=label)
    axis.axhline(peer.loss, color="#888", linestyle=":", label="where the Trainer ends")
    axis.set_xlabel("training time (s)")
    axis.set_ylabel("validation loss (nats)")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
