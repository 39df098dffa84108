"""Find mistakes in a run before it trains. These checks come first because they are fast: most do not import torch."""

import importlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any, get_type_hints

from modernenc import ranges
from modernenc.config import Run
from modernenc.curriculum import Curriculum, reads_text, sources_of
from modernenc.data.blocks import VALIDATION, Corpus
from modernenc.data.store import ATTEMPTS, longest_fetch_s


def check_run(run: Run) -> tuple[Curriculum, Corpus]:
    """Return the curriculum and the corpus of a run; ValueError or FileNotFoundError names what it cannot train with.

    Every index that training and validation read is opened, with its shards' sizes, and so is the tokenizer.
    """
    curriculum = check_settings(run)
    corpus = Corpus.of(run.data)
    check_corpus(run, corpus)
    folders = {path for phase in run.phases.values() if reads_text(phase) for path in corpus.slices(phase.mix)}
    for folder in sorted(folders | {f"{source}/{VALIDATION}" for source in sources_of(run)}):
        corpus.open(folder)
    _ = corpus.tokenizer_file
    return curriculum, corpus


def check_corpus(run: Run, corpus: Corpus) -> None:
    """Raise ValueError or FileNotFoundError if a run does not fit what the manifest of a corpus and its own tasks hold."""
    if corpus.vocab_size > run.backbone["vocab_size"]:
        raise ValueError(
            f"backbone.vocab_size={run.backbone['vocab_size']} is smaller than the {corpus.vocab_size} entries of "
            f"{corpus.tokenizer_file}; raise it, or set it to 0, which takes the corpus's"
        )
    for name, task in run.tasks.items():
        if name in corpus.sources:
            raise ValueError(f"tasks.{name}: {corpus.store} has a source of this name; give the task another")
        from modernenc.data.choices import read  # imports torch, which a run without tasks does not need here

        for key in ("train", "validation"):
            read(Path(getattr(task, key)), f"tasks.{name}.{key}")
    for name, phase in run.phases.items():
        if not reads_text(phase):
            continue
        for path in corpus.slices(phase.mix, f"phases.{name}.mix"):
            blocks = corpus.counts(path)["blocks"]
            if blocks < run.data.lanes:
                raise ValueError(
                    f"data.lanes={run.data.lanes} exceeds the {blocks} blocks of {path} in phases.{name}.mix; "
                    f"use fewer lanes, as data.lanes=0 does, or prepare with smaller blocks than {corpus.block_tokens} tokens"
                )


def check_settings(run: Run) -> Curriculum:
    """Return the curriculum of a run whose settings are consistent, whatever the data; ValueError names one that is not."""
    curriculum = Curriculum.of(run)
    ranges.check("", Run, run)
    _check_combinations(run)
    _check_ranks(run)
    _check_arguments("optim", run.optim, given=("parameters", "matrices"))
    backbone = _check_arguments("backbone", run.backbone)
    lengths = {f"tasks.{name}": task.seq_len for name, task in run.tasks.items()}
    for name, seq_len in {**lengths, **{f"phases.{name}": phase.seq_len for name, phase in run.phases.items()}}.items():
        if seq_len > run.backbone["max_position"]:
            raise ValueError(
                f"{name}.seq_len={seq_len} exceeds backbone.max_position={run.backbone['max_position']}; "
                "lower it or raise backbone.max_position"
            )
    for name, phase in run.phases.items():
        for key, value in phase.backbone.items():
            if key not in backbone.PHASE_ATTRIBUTES:
                raise ValueError(
                    f"phases.{name}.backbone.{key}: a phase may set {', '.join(backbone.PHASE_ATTRIBUTES)} of "
                    f"{backbone.__name__}"
                )
            ranges.check(f"phases.{name}.backbone.{key}", argument_kinds(backbone).get(key, float), value)
    return curriculum


def _check_combinations(run: Run) -> None:
    """Raise ValueError for a setting that is legal by itself and not beside another, or that this installation lacks."""
    tries = longest_fetch_s(run.data.timeout_s)
    if run.data.workers and "://" in run.data.root and run.data.loader_timeout_s <= tries:
        raise ValueError(
            f"data.loader_timeout_s={run.data.loader_timeout_s:g}: a read of {run.data.root} may take {tries:g} seconds, "
            f"{ATTEMPTS} times data.timeout_s and the pauses; expected more"
        )
    for name in ("unigram", "neighbours"):
        if getattr(run.init, name) and not any(reads_text(phase) for phase in run.phases.values()):
            raise ValueError(f"init.{name}=True: expected false where no phase reads text")
    if run.logger.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"logger.wandb={run.logger.wandb}: wandb is not installed; pip install 'modernenc[wandb]'")


def _check_ranks(run: Run) -> None:
    ranks = run.trainer.devices * run.trainer.num_nodes
    if ranks > run.data.lanes:
        raise ValueError(
            f"trainer.devices x trainer.num_nodes = {ranks} ranks exceed data.lanes={run.data.lanes}; "
            "use fewer devices or more lanes (more lanes make another run)"
        )
    # Rank r serves the lanes l with l mod ranks = r. Where the lanes start over, its next row may come that many rows later.
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


def _check_arguments(group: str, node: dict[str, Any], given: tuple[str, ...] = ()) -> Any:
    """Return what `_target_` names; ValueError if there is no such thing, or it does not take the arguments or their values.

    `given` are the arguments that the program adds.
    """
    if "_target_" not in node:
        raise ValueError(f"{group}: no _target_; choose one with {group}=NAME")
    module, _, called = str(node["_target_"]).rpartition(".")
    try:
        found = importlib.util.find_spec(module) if module else None
    except (ImportError, ValueError):  # of a parent that is no package, or a name that cannot be one
        found = None
    if found is None:
        raise ValueError(f"{group}._target_={node['_target_']}: there is no module {module}; install it or mend the name")
    target: Any = getattr(importlib.import_module(module), called, None)
    if not callable(target):
        raise ValueError(f"{group}._target_={node['_target_']}: there is no {called} in {module}")
    parameters = {name: one for name, one in inspect.signature(target).parameters.items() if name not in given}
    kinds = argument_kinds(target)
    for key, value in node.items():
        if key not in parameters and key != "_target_":
            raise ValueError(f"{group}.{key}: unknown key; {target.__name__} takes {', '.join(parameters)}")
        ranges.check(f"{group}.{key}", kinds.get(key, Any), value)
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in node:
            raise ValueError(f"{group}.{name}: no value, but {target.__name__} needs one")
    return target


def argument_kinds(target: Any) -> dict[str, Any]:
    """Return the annotations, ranges included, of the arguments that a class or a function takes, by name."""
    return get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
