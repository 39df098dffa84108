"""All that can be known to be wrong with a run before it trains. Cheap checks first: torch is imported only past them."""

import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from modernenc.config import Run
from modernenc.curriculum import Curriculum, reads_text
from modernenc.data.blocks import Corpus
from modernenc.estimate import DEVICES

ACCELERATORS = ("auto", "cpu", "gpu")
PRECISIONS = ("bf16-mixed", "32-true")
STRATEGIES = ("auto", "ddp", "fsdp")
DETERMINISM = ("fast", "strict")
LAYERS = ("spread", "by_kind")
ACTIONS = ("off", "warn", "stop")
WANDB_MODES = ("off", "offline", "online")


def check_run(run: Run) -> tuple[Curriculum, Corpus]:
    """The curriculum and the corpus of a run that can train; ValueError or FileNotFoundError names what cannot."""
    curriculum = check_settings(run)
    corpus = Corpus.of(run.data)
    if corpus.vocab_size > run.backbone["vocab_size"]:
        raise ValueError(
            f"backbone.vocab_size={run.backbone['vocab_size']} is smaller than the {corpus.vocab_size} entries of "
            f"{corpus.tokenizer_file}; raise it, or set it to 0, which takes the corpus's"
        )
    for name, task in run.tasks.items():
        if name in corpus.sources:
            raise ValueError(f"tasks.{name}: {corpus.store} has a source of this name; give the task another")
        from modernenc.data.choices import read  # with torch

        for key in ("train", "validation"):
            read(Path(getattr(task, key)), f"tasks.{name}.{key}")
    for name, phase in run.phases.items():
        for path in corpus.slices(phase.mix, f"phases.{name}.mix") if reads_text(phase) else ():
            blocks = corpus.counts(path)["blocks"]
            if blocks < run.data.lanes:
                raise ValueError(
                    f"data.lanes={run.data.lanes} exceeds the {blocks} blocks of {path} in phases.{name}.mix; "
                    f"use fewer lanes, as data.lanes=0 does, or prepare with smaller blocks than {corpus.block_tokens} tokens"
                )
    return curriculum, corpus


def check_settings(run: Run) -> Curriculum:
    """The curriculum of a run whose settings fit each other, whatever the data; ValueError names the first that does not."""
    curriculum = Curriculum.of(run)
    _check_values(run)
    _check_ranks(run)
    _check_arguments("optim", run.optim, given=("parameters", "matrices"))
    backbone = _check_arguments("backbone", run.backbone)
    for name, task in run.tasks.items():
        if task.seq_len > run.backbone["max_position"]:
            raise ValueError(
                f"tasks.{name}.seq_len={task.seq_len} exceeds backbone.max_position={run.backbone['max_position']}; "
                "lower it or raise backbone.max_position"
            )
    for name, phase in run.phases.items():
        if phase.seq_len > run.backbone["max_position"]:
            raise ValueError(
                f"phases.{name}.seq_len={phase.seq_len} exceeds backbone.max_position={run.backbone['max_position']}; "
                "lower it or raise backbone.max_position"
            )
        for key, value in phase.backbone.items():
            if isinstance(run.backbone.get(key), int | float) and not isinstance(value, int | float):
                raise ValueError(f"phases.{name}.backbone.{key}={value}: expected a number")
            if key not in backbone.PHASE_ATTRIBUTES:
                raise ValueError(
                    f"phases.{name}.backbone.{key}: a phase may set {', '.join(backbone.PHASE_ATTRIBUTES)} of "
                    f"{backbone.__name__}"
                )
    return curriculum


def check_hardware(run: Run) -> None:
    """Raise ValueError when this machine lacks the devices that the run asks for."""
    import torch

    from modernenc import ranks

    ranks.environment(run.trainer.devices, run.trainer.num_nodes)
    devices = torch.cuda.device_count()
    accelerator = run.trainer.accelerator
    if (accelerator == "gpu" or (accelerator == "auto" and devices)) and devices < run.trainer.devices:
        raise ValueError(
            f"trainer.accelerator={accelerator} trainer.devices={run.trainer.devices}: this machine has {devices} CUDA "
            "devices; ask for fewer, or for trainer.accelerator=cpu trainer.devices=1 trainer.strategy=auto"
        )


def check_backbone(run: Run) -> None:
    """Raise ValueError when the backbone cannot be built with its settings."""
    import torch

    from modernenc.model import build_objectives

    with _built("backbone", run.backbone), torch.device("meta"):
        build_objectives(run)


def check_init(run: Run, corpus: Corpus) -> list[str]:
    """What is to be said of the weights to begin with; ValueError or FileNotFoundError when there are none, or do not fit."""
    if not run.init.source:
        return []
    from modernenc.initialization import check_source, fill, read_source
    from modernenc.model import build_objectives

    source = read_source(Path(run.init.source), run)
    notes = check_source(source, run)
    fill(build_objectives(run).masked_lm, source, run, corpus.tokenizer_file)
    return notes


def check_optim(run: Run) -> None:
    """Raise ValueError when the optimizers cannot be built with their settings."""
    from torch import nn

    from modernenc import optim
    from modernenc.backbones.description import Description

    linear = nn.Linear(2, 2)  # optimizers only look at their settings: any weights will do
    backbone = SimpleNamespace(describe=lambda: Description([linear], ["linear"], lambda length: 0.0))
    objectives: Any = SimpleNamespace(masked_lm=linear, backbone=backbone, tasks=nn.ModuleDict())
    with _built("optim", run.optim):
        optim.build(objectives, run.optim)


@contextmanager
def _built(group: str, node: dict[str, Any]) -> Iterator[None]:
    """Say which group of settings it is that something cannot be built with."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if str(error).startswith(group):
            raise
        name = node["_target_"].rpartition(".")[2]
        raise ValueError(f"{group}: {name} cannot be built with these settings: {error}") from error


def _check_values(run: Run) -> None:
    def require(holds: bool, key: str, value: object, expected: str) -> None:
        if not holds:
            raise ValueError(f"{key}={value}: expected {expected}")

    trainer, data = run.trainer, run.data
    require(0 <= run.seed < 1 << 63, "seed", run.seed, "a number from 0 to 2^63 - 1")
    for group in ("checkpoint", "validation"):
        for key in ("every_tokens", "every_minutes"):
            value = getattr(getattr(run, group), key, 0)
            require(value >= 0, f"{group}.{key}", value, "0, for never, or more")
    for group, key in (("data", "timeout_s"), ("watch", "window_tokens"), ("watch", "z"), ("watch", "patience")):
        value = getattr(getattr(run, group), key)
        require(value > 0, f"{group}.{key}", value, "more than 0")
    for key, value in run.optim.items() if isinstance(run.optim, dict) else ():
        if key in ("lr", "adamw_lr") and isinstance(value, int | float):
            require(value > 0, f"optim.{key}", value, "more than 0")
    require(
        trainer.accelerator in ACCELERATORS, "trainer.accelerator", trainer.accelerator, f"one of {', '.join(ACCELERATORS)}"
    )
    require(trainer.precision in PRECISIONS, "trainer.precision", trainer.precision, f"one of {', '.join(PRECISIONS)}")
    require(trainer.strategy in STRATEGIES, "trainer.strategy", trainer.strategy, f"one of {', '.join(STRATEGIES)}")
    require(trainer.determinism in DETERMINISM, "trainer.determinism", trainer.determinism, f"one of {', '.join(DETERMINISM)}")
    require(trainer.recompute_every >= 0, "trainer.recompute_every", trainer.recompute_every, "a number of blocks, or 0")
    require(run.watch.action in ACTIONS, "watch.action", run.watch.action, f"one of {', '.join(ACTIONS)}")
    require(
        run.estimate.device in ("", *DEVICES),
        "estimate.device",
        run.estimate.device,
        f"one of {', '.join(DEVICES)}, or nothing",
    )
    require(0 < run.estimate.mfu <= 1, "estimate.mfu", run.estimate.mfu, "a share in (0, 1]")
    readable = any(reads_text(phase) for phase in run.phases.values())
    require(readable or not run.init.unigram, "init.unigram", True, "false where no phase reads text")
    require(run.init.layers in LAYERS, "init.layers", run.init.layers, f"one of {', '.join(LAYERS)}")
    require(run.clip_grad_norm >= 0, "clip_grad_norm", run.clip_grad_norm, "a norm, or 0 for no limit")
    muon = str(run.optim.get("_target_", "")).endswith(".muon") if isinstance(run.optim, dict) else False
    require(
        not (muon and trainer.strategy == "fsdp"),
        "trainer.strategy",
        "fsdp",
        "ddp with optim=muon, whose matrices must be whole",
    )
    require(trainer.micro_batch_tokens > 0, "trainer.micro_batch_tokens", trainer.micro_batch_tokens, "1 or more")
    require(trainer.devices > 0, "trainer.devices", trainer.devices, "1 or more")
    require(trainer.num_nodes > 0, "trainer.num_nodes", trainer.num_nodes, "1 or more")
    require(data.workers in (0, 1), "data.workers", data.workers, "0 or 1; more would repeat the packing")
    require(data.lanes > 0, "data.lanes", data.lanes, "1 or more")
    require(data.window_rows > 0, "data.window_rows", data.window_rows, "1 or more")
    require(run.logger.wandb in WANDB_MODES, "logger.wandb", run.logger.wandb, f"one of {', '.join(WANDB_MODES)}")
    if run.logger.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"logger.wandb={run.logger.wandb}: wandb is not installed; pip install 'modernenc[wandb]'")
    require(run.logger.every_steps > 0, "logger.every_steps", run.logger.every_steps, "1 or more")
    require(run.checkpoint.keep_last > 0, "checkpoint.keep_last", run.checkpoint.keep_last, "1 or more")
    require(run.validation.tokens_per_source > 0, "validation.tokens_per_source", run.validation.tokens_per_source, "1 or more")


def _check_ranks(run: Run) -> None:
    ranks = run.trainer.devices * run.trainer.num_nodes
    if ranks > run.data.lanes:
        raise ValueError(
            f"trainer.devices x trainer.num_nodes = {ranks} ranks exceed data.lanes={run.data.lanes}; "
            "use fewer devices or more lanes (more lanes make another run)"
        )
    # Rank r serves the lanes l with l mod ranks = r: where the lanes start over, its next row may be that much further.
    needed = ranks + run.data.lanes % ranks
    for name, task in run.tasks.items():
        if task.batch_items < ranks:
            raise ValueError(f"tasks.{name}.batch_items={task.batch_items}: {ranks} ranks need at least one item each")
    for name, phase in run.phases.items():
        if not reads_text(phase):
            continue
        key, rows = ("ramp.start_rows", phase.ramp.start_rows) if phase.ramp.tokens else ("batch_rows", phase.batch_rows)
        if rows < needed:
            raise ValueError(
                f"phases.{name}.{key}={rows}: {ranks} ranks and {run.data.lanes} lanes need at least {needed} rows"
            )


def _check_arguments(group: str, node: Any, given: tuple[str, ...] = ()) -> Any:
    """What `_target_` names; ValueError when it cannot be found or would not take the arguments."""
    if not isinstance(node, dict) or "_target_" not in node:
        raise ValueError(f"{group}: no _target_; choose one with {group}=NAME")
    module, _, called = node["_target_"].rpartition(".")
    try:
        found = importlib.util.find_spec(module) if module else None
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ValueError(f"{group}._target_={node['_target_']}: there is no module {module}; install it or mend the name")
    target: Any = getattr(importlib.import_module(module), called, None)
    if not callable(target):
        raise ValueError(f"{group}._target_={node['_target_']}: there is no {called} in {module}")
    parameters = inspect.signature(target).parameters
    for key in node:
        if key not in parameters and key != "_target_":
            names = ", ".join(name for name in parameters if name not in given)
            raise ValueError(f"{group}.{key}: unknown key; {target.__name__} takes {names}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in node and name not in given:
            raise ValueError(f"{group}.{name}: no value, but {target.__name__} needs one")
        wanted, value = parameter.annotation, node.get(name)
        if (wanted is int and isinstance(value, str | float)) or (wanted is float and isinstance(value, str)):
            raise ValueError(f"{group}.{name}={value}: expected {wanted.__name__}")
    return target
