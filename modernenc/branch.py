"""Go on from a checkpoint under changed settings: a rollback in the same run, a branch in its own.

Both make a checkpoint to start from, which holds the new configuration, so that all that follows is an ordinary resume.
What was trained already must be what the new configuration would have trained in its place.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from modernenc import checkpoints
from modernenc.config import CONFIG, Run
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.data.loader import DataState, Steps

ABANDONED = "abandoned"
"""Folder of a run that holds, by number, what its rollbacks gave up."""
PLACE = (
    "run_dir", "branch_from", "trainer", "checkpoint", "validation", "watch", "logger", "cluster",
    "data.root", "data.cache", "data.timeout_s", "data.workers", "data.hint",
)  # fmt: skip
"""Settings that do not change what a run trains."""
_HISTORY = ("seed", "backbone", "data.lanes", "data.window_rows", "optim._target_")
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
    for key, there, here in differences(content["run"], _plain(run)):
        if not key.startswith(PLACE):
            raise ValueError(
                f"{checkpoint} was trained with {key}={there}, but {Path(run.run_dir) / CONFIG} has {here}: it is of another "
                f"run; start from it with python -m modernenc.train +recipe=NAME +from={checkpoint}"
            )


def fork(run: Run, corpus: Corpus, content: dict[str, Any], skip_tokens: int = 0) -> dict[str, Any]:
    """The content of a checkpoint as the start of a run under other settings, past `skip_tokens` of row capacity of data.

    ValueError names a setting that would change what was trained already.
    """
    state, old, new = content["state"], content["run"], _plain(run)
    done = list(old["phases"])[: list(old["phases"]).index(state["phase"]) + 1]
    if list(new["phases"])[: len(done)] != done:
        raise ValueError(f"phases={', '.join(new['phases'])}: the checkpoint has trained {', '.join(done)}, which come first")
    fixed = (*_HISTORY, *(f"phases.{phase}.{key}" for phase in done for key in ("mix", "seq_len")))
    for key, there, here in differences(old, new):
        if key.startswith(fixed):
            raise ValueError(f"{key}={here}, but {there} in the checkpoint: what it has trained already cannot change")
    curriculum, position = Curriculum(run.phases), state["tokens_seen"]
    was = _levels(Curriculum(take_up(content, run.run_dir).phases), position)
    would_be = _levels(curriculum, position)
    if was != would_be:
        raise ValueError(
            f"phases: the checkpoint came to {position:,} tokens by {was}, the new settings would by {would_be} (phase, rows, "
            "length, first step); keep tokens, rows and ramps up to there, and change what follows"
        )
    data = state["data"]
    if skip_tokens:
        data = Steps(run, curriculum, corpus, 0, 1, DataState.from_dict(data)).skip(skip_tokens).to_dict()
    state = {
        **state,
        "data": data,
        "boundary": position in {curriculum.end_of(phase) for phase in run.phases},
        "corpus": corpus.fingerprint(phase.mix for phase in run.phases.values()),
    }
    return {**content, "run": new, "state": state}


def _levels(curriculum: Curriculum, tokens_seen: int) -> list[tuple[str, int, int, int]]:
    """The stretches of equal steps that lead to a position."""
    return [
        (level.phase, level.batch_rows, level.seq_len, level.first_step)
        for level in curriculum.levels
        if level.first_tokens < tokens_seen
    ]


def take_up(content: dict[str, Any], run_dir: str) -> Run:
    """The settings that a checkpoint was trained under, in this run folder."""
    merged = OmegaConf.merge(OmegaConf.structured(Run), content["run"], {"run_dir": run_dir})
    return cast(Run, OmegaConf.to_object(merged))


def give_up(run_dir: Path, tokens_seen: int) -> Path:
    """Set aside what a run holds past a position: checkpoints, the configuration and tables so far; the folder they are in."""
    number = 1 + sum(1 for _ in (run_dir / ABANDONED).glob("*"))
    folder = run_dir / ABANDONED / str(number)
    (folder / checkpoints.FOLDER).mkdir(parents=True)
    for path in (run_dir / checkpoints.FOLDER).glob("*.ckpt"):
        if checkpoints.tokens_seen(path) > tokens_seen:
            for part in checkpoints.files_of(path):
                part.rename(folder / checkpoints.FOLDER / part.name)
    for name in (CONFIG, "metrics.csv", "validation.csv"):
        if (run_dir / name).exists():
            (folder / name).write_bytes((run_dir / name).read_bytes())
    return folder


def _plain(run: Run) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.structured(run))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}
