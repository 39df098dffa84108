"""Go on from a checkpoint under changed settings: a rollback in the same run, a branch in its own.

Both make a checkpoint to start from, which holds the new configuration, so that all that follows is an ordinary resume. After a
rollback the run's older checkpoints count for less than that one, however many tokens they have seen.
What was trained already must be what the new configuration would have trained in its place.
"""

import math
import shlex
import shutil
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from modernenc import checkpoints, lineage, plan
from modernenc.config import CONFIG, TASK_FILES, Run, plain, save, unfinished
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.data.loader import Steps, fingerprint
from modernenc.data.state import DataState
from modernenc.model import build_objectives, weights_of

ABANDONED = "abandoned"
"""Folder of a run that holds, by number, what its rollbacks gave up."""
PLACE = (
    "run_dir", "branch_from", "rollbacks", "trainer", "checkpoint", "validation", "watch", "logger", "cluster",
    "estimate",
    "data.root", "data.cache", "data.timeout_s", "data.workers", "data.hint", "data.from_corpus",
)  # fmt: skip
"""Settings that do not change what a run trains."""
_HISTORY = ("seed", "backbone", "data.lanes", "data.buffer_rows", "optim._target_")
"""Settings that a position in the data, or the weights, only make sense with."""


def differences(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys at which two configurations differ, with both values; None stands for nothing."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in {**one, **other}:
            yield from differences(one.get(name), other.get(name), f"{key}.{name}" if key else name)
    elif one != other:
        yield key, one, other


def check_same_run(run: Run, checkpoint: Path, content: dict[str, Any]) -> None:
    """Raise ValueError when a checkpoint was trained under other settings than its run folder holds."""
    for key, there, here in differences(content["run"], plain(run)):
        if not key.startswith(PLACE) and not TASK_FILES.match(key):
            raise ValueError(
                f"{checkpoint} was trained with {key}={there}, but {Path(run.run_dir) / CONFIG} has {here}: it is of another "
                f"run; start from it with python -m modernenc.train +recipe={run.recipe} +from={shlex.quote(str(checkpoint))}"
            )


def done_phases(run: Run, tokens_seen: int) -> list[str]:
    """Phases that end at a position or before it."""
    return [name for name in run.phases if Curriculum.of(run).end_of(name) <= tokens_seen]


def branched(run: Run, corpus: Corpus) -> dict[str, Any]:
    """The content of the checkpoint `run.branch_from` as the run's start; FileNotFoundError, or ValueError as by `fork`."""
    parent = Path(run.branch_from).resolve()
    if parent.suffix != ".ckpt" or not parent.is_file():
        raise FileNotFoundError(f"+from={run.branch_from}: no checkpoint; name one of RUN_DIR/checkpoints/*.ckpt")
    return fork(run, corpus, checkpoints.read(parent))


def fork(run: Run, corpus: Corpus, content: dict[str, Any], skip_tokens: int = 0) -> dict[str, Any]:
    """The content of a checkpoint as the start of a run under other settings, past `skip_tokens` of row capacity of data.

    `run` takes the phases that are done from the checkpoint. ValueError names a setting that would change what was trained
    already.
    """
    state, old = content["state"], content["run"]
    before = take_up(content, run.run_dir)
    for name in done_phases(before, state["tokens_seen"]):
        if name in run.phases:
            run.phases[name] = before.phases[name]
    new = plain(run)
    done = list(old["phases"])[: list(old["phases"]).index(state["phase"]) + 1]
    if list(new["phases"])[: len(done)] != done:
        raise ValueError(f"phases={', '.join(new['phases'])}: the checkpoint has trained {', '.join(done)}, which come first")
    fixed = (*_HISTORY, *(f"phases.{phase}.{key}" for phase in done for key in ("mix", "seq_len", "objectives")))
    for key, there, here in differences(old, new):
        if key.startswith(fixed):
            raise ValueError(f"{key}={here}, but {there} in the checkpoint: what it has trained already cannot change")
    curriculum, position = Curriculum.of(run), state["tokens_seen"]
    for was, would_be in zip_longest(_levels(Curriculum.of(before), position), _levels(curriculum, position)):
        if was != would_be:
            raise ValueError(
                f"phases.{was[0] if was else would_be[0]}: up to {position:,} tokens, where the checkpoint is, it had "
                f"{_said(was)}, now it has {_said(would_be)}; keep tokens, rows and ramps up to there, and change what follows"
            )
    data = state["data"]
    if skip_tokens:
        data = Steps(run, curriculum, corpus, 0, 1, DataState.from_dict(data)).skip(skip_tokens).to_dict()
    state = {
        **state,
        "data": data,
        "boundary": position in {curriculum.end_of(phase) for phase in run.phases},
        **fingerprint(run, corpus),
    }
    weights = content["weights"] if old["tasks"].keys() == new["tasks"].keys() else _with_heads(run, content["weights"])
    return {"weights": weights, "optimizers": content["optimizers"], "run": new, "state": state}


def _with_heads(run: Run, weights: dict[str, Any]) -> dict[str, Any]:
    """The weights with new heads for tasks that they have none for, and without those of tasks that the run has not."""
    heads = {name: value.detach() for name, value in weights_of(build_objectives(run)).items() if name.startswith("tasks.")}
    others = {name: value for name, value in weights.items() if not name.startswith("tasks.")}
    return {**others, **{name: weights.get(name, value) for name, value in heads.items()}}


def _said(level: tuple[str, int, int, int, tuple[int, ...]] | None) -> str:
    return f"{level[1]:,} rows of {level[2]:,} tokens from step {level[3]:,} on" if level else "no further steps"


def _levels(curriculum: Curriculum, tokens_seen: int) -> list[tuple[str, int, int, int, tuple[int, ...]]]:
    """The stretches of equal steps that lead to a position."""
    return [
        (level.phase, level.batch_rows, level.seq_len, level.first_step, level.sizes)
        for level in curriculum.levels
        if level.first_tokens < tokens_seen
    ]


def take_up(content: dict[str, Any], run_dir: str) -> Run:
    """The settings that a checkpoint was trained under, in this run folder."""
    merged = OmegaConf.merge(OmegaConf.structured(Run), content["run"], {"run_dir": run_dir})
    return cast(Run, OmegaConf.to_object(merged))


def go_back(run: Run, content: dict[str, Any], event: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint as the start of the rest of its run, after one more rollback than there ever were."""
    orders = [checkpoints.order(path) for path in (Path(run.run_dir) / checkpoints.FOLDER).glob("*.ckpt")]
    known = [rollbacks for rollbacks, _ in orders if rollbacks < math.inf]
    run.rollbacks = 1 + int(max([run.rollbacks, *known]))
    event["abandoned"] = f"{ABANDONED}/{run.rollbacks}"
    return {**content, "run": {**content["run"], "rollbacks": run.rollbacks}, "event": event}


def settle(run: Run, curriculum: Curriculum, content: dict[str, Any] | None, event: dict[str, Any], ranks: int) -> None:
    """Write down how the run goes on.

    A rollback is done once the checkpoint that it starts from is there: what is left to do then can be done again, by whoever
    goes on with the run, until the configuration is written.
    """
    run_dir = Path(run.run_dir)
    position = content["state"]["tokens_seen"] if content else 0
    if content is None or event["event"] != "rollback":
        if event["event"] != "resume" or content is None:
            _point_latest(run_dir)
        return lineage.add(run_dir, event, ranks, position)
    number = content["run"]["rollbacks"]
    start = run_dir / checkpoints.FOLDER / f"rollback-{number}.ckpt"
    if checkpoints.order(start) != (number, position):
        checkpoints.write(content, start)
    give_up(run_dir, number, position)
    if all(entry.get("abandoned") != event["abandoned"] for entry in lineage.read(run_dir)):
        lineage.add(run_dir, event, ranks, position)
    (run_dir / "plan.txt").write_text(plan.text(run, curriculum) + "\n")
    save(take_up(content, run.run_dir))


def _point_latest(run_dir: Path) -> None:
    """Have `latest`, beside the run, lead to it."""
    latest = run_dir.parent / "latest"
    unfinished(latest).unlink(missing_ok=True)
    unfinished(latest).symlink_to(run_dir.name)
    unfinished(latest).replace(latest)


def give_up(run_dir: Path, number: int, tokens_seen: int) -> None:
    """Set aside what a run held past a position before a rollback: checkpoints, the configuration and tables so far."""
    folder = run_dir / ABANDONED / str(number)
    (folder / checkpoints.FOLDER).mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, "metrics.csv", "validation.csv"):
        if (run_dir / name).exists() and not (folder / name).exists():
            shutil.copyfile(run_dir / name, folder / (name + ".tmp"))
            (folder / (name + ".tmp")).rename(folder / name)
    for path in (run_dir / checkpoints.FOLDER).glob("*.ckpt"):
        rollbacks, tokens = checkpoints.order(path)
        if tokens > tokens_seen and rollbacks != number:
            for part in checkpoints.files_of(path):
                part.rename(folder / checkpoints.FOLDER / part.name)
