"""Evaluate the checkpoints of a run as they appear, in a process of its own beside the one that trains.

The scores go to `evaluations.csv` in the run folder, from which the run's report draws curves and the training process feeds
its loggers. What is evaluated stands in the recipe: `evaluate.suites` and `evaluate.every_tokens`.
"""

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from modernenc.config import Run
from modernenc.run_folder import checkpoints
from modernenc.run_folder.load import locate
from modernenc.run_folder.tables import Table

log = logging.getLogger(__name__)

TABLE, FOLDER = "evaluations.csv", "evaluations"
_POLL_S = 10
_NICE = 19
"""Priority of the evaluation, the lowest, so that training has the cores first."""


def watch(run_dir: Path, once: bool) -> None:
    """Evaluate each checkpoint that is due until the last one of the run is, or only those that are there now.

    Raises ValueError if the run names no suites, FileNotFoundError if there is no run.
    """
    run, _ = locate(run_dir)
    if not run.evaluate.suites:
        raise ValueError(
            f"{run_dir}: evaluate.suites is empty; name suites and their arguments in the recipe, or when resuming the run, as "
            "+evaluate.suites.mlm='--data data/demo'"
        )
    os.nice(_NICE - os.nice(0))
    last = checkpoints.name_at_end(list(run.phases)[-1])
    while True:
        for checkpoint in due(run, Path(run.run_dir)):
            evaluate(run, checkpoint)
        if once or any(row["checkpoint"] == last for row in Table(Path(run.run_dir) / TABLE).read()):
            return
        time.sleep(_POLL_S)


def due(run: Run, run_dir: Path) -> Iterator[Path]:
    """Yield the finished checkpoints that are to be evaluated and were not: at the ends of phases, and every so many tokens."""
    rows = Table(run_dir / TABLE).read()
    done, every = {int(row["step"]) for row in rows}, run.evaluate.every_tokens
    reached = max((int(row["tokens_seen"]) for row in rows), default=0)
    finished = (path for path in (run_dir / checkpoints.FOLDER).glob("*.ckpt") if checkpoints.is_finished(path))
    for path in sorted(finished, key=checkpoints.sort_key):
        manifest = checkpoints.read_manifest(path)
        tokens = manifest["tokens_seen"]
        if manifest["step"] not in done and (manifest["boundary"] or (every and tokens // every > reached // every)):
            reached = max(reached, tokens)
            done.add(manifest["step"])
            yield path


def evaluate(run: Run, checkpoint: Path) -> None:
    """Run the suites on a checkpoint and add their scores to the table.

    A suite that fails, as one does whose checkpoint was pruned meanwhile, is reported and left out.
    """
    run_dir, manifest = Path(run.run_dir), checkpoints.read_manifest(checkpoint)
    for suite, arguments in run.evaluate.suites.items():
        command = [sys.executable, "-m", "modernenc.evaluate", suite, f"{checkpoint.stem}={checkpoint}"]
        ended = subprocess.run([*command, *shlex.split(arguments), "--out", str(run_dir / FOLDER)], check=False)
        if ended.returncode:
            log.warning("%s of %s failed; its message is above", suite, checkpoint)
            continue
        found = json.loads((run_dir / FOLDER / f"{suite}.json").read_text())["rows"]
        rows = [row for row in found if row["model"] == checkpoint.stem]  # and not what it is held against, such as BM25
        at = {"step": manifest["step"], "tokens_seen": manifest["tokens_seen"], "checkpoint": checkpoint.stem, "suite": suite}
        errors = ((row, (row["seed_error"] ** 2 + row["item_error"] ** 2) ** 0.5) for row in rows)
        Table(run_dir / TABLE).append(
            *({**at, "task": row["task"], "score": row["score"], "error": error} for row, error in errors)
        )
