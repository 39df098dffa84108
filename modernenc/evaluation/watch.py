"""Evaluate the checkpoints of a run as they appear, in a process of its own beside the one that trains.

The scores go to `evaluations.csv` in the run folder, from which the run's report draws curves and the training process feeds
its loggers. What is evaluated stands in the recipe: `evaluate.suites` and `evaluate.every_tokens`.
"""

import json
import logging
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from modernenc.config import Run
from modernenc.evaluation.models import CACHE
from modernenc.run_folder import checkpoints
from modernenc.run_folder.load import locate
from modernenc.run_folder.tables import Table

log = logging.getLogger(__name__)

TABLE, FOLDER = "evaluations.csv", "evaluations"
_POLL_S = 10


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
    last, failed = checkpoints.name_at_end(list(run.phases)[-1]), set[tuple[str, str]]()
    while True:
        for checkpoint, wanted in groupby(due(run, Path(run.run_dir)), key=itemgetter(0)):
            for _, suite in wanted:
                if (checkpoint.stem, suite) not in failed and not evaluate(run, checkpoint, suite):
                    failed.add((checkpoint.stem, suite))
            shutil.rmtree(Path(run.run_dir) / FOLDER / CACHE, ignore_errors=True)  # a copy of each checkpoint would stay
        done = {row["suite"] for row in Table(Path(run.run_dir) / TABLE).read() if row["checkpoint"] == last}
        done |= {suite for checkpoint, suite in failed if checkpoint == last}
        if once or done >= set(run.evaluate.suites):
            break
        time.sleep(_POLL_S)
    if failed:
        raise ValueError(f"{run_dir}: failed, with messages above: {', '.join(f'{suite} of {name}' for name, suite in failed)}")


def due(run: Run, run_dir: Path) -> Iterator[tuple[Path, str]]:
    """Yield each finished checkpoint at the end of a phase or every so many tokens, and each suite that it lacks."""
    rows = Table(run_dir / TABLE).read()
    done, every = {(int(row["step"]), row["suite"]) for row in rows}, run.evaluate.every_tokens
    chosen = {int(row["step"]) for row in rows}
    reached = max((int(row["tokens_seen"]) for row in rows), default=0)
    finished = (path for path in (run_dir / checkpoints.FOLDER).glob("*.ckpt") if checkpoints.is_finished(path))
    for path in sorted(finished, key=checkpoints.sort_key):
        manifest = checkpoints.read_manifest(path)
        step, tokens = manifest["step"], manifest["tokens_seen"]
        if manifest["boundary"] or step in chosen or (every and tokens // every > reached // every):
            reached = max(reached, tokens)
            chosen.add(step)
            wanted = [suite for suite in run.evaluate.suites if (step, suite) not in done]
            done |= {(step, suite) for suite in wanted}
            yield from ((path, suite) for suite in wanted)


def evaluate(run: Run, checkpoint: Path, suite: str) -> bool:
    """Run a suite on a checkpoint, add its scores to the table, and return whether it succeeded.

    One whose checkpoint was pruned meanwhile does not.
    """
    run_dir, manifest = Path(run.run_dir), checkpoints.read_manifest(checkpoint)
    command = [sys.executable, "-m", "modernenc.evaluate", suite, f"{checkpoint.stem}={checkpoint}"]
    arguments = shlex.split(run.evaluate.suites[suite])
    if subprocess.run([*command, *arguments, "--out", str(run_dir / FOLDER)], check=False).returncode:
        log.warning("%s of %s failed; its message is above", suite, checkpoint)
        return False
    rows = json.loads((run_dir / FOLDER / f"{suite}.json").read_text())["rows"]
    at = {"step": manifest["step"], "tokens_seen": manifest["tokens_seen"], "checkpoint": checkpoint.stem, "suite": suite}
    Table(run_dir / TABLE).append(
        *(
            {
                **at,
                "task": row["task"],
                "score": row["score"],
                "error": row["error"],
            }
            for row in rows
            if row["model"] == checkpoint.stem
        )
    )
    return True
