"""Record in a run folder how a run starts and goes on, and archive what a rollback abandons.

After a rollback the run's older checkpoints rank below the new one, however many tokens they have seen.
"""

import logging
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from modernenc.atomic import partial_path
from modernenc.config import Run
from modernenc.run_folder import checkpoints, lineage
from modernenc.run_folder.checkpoints import Checkpoint
from modernenc.run_folder.create import new_id, write_plan
from modernenc.run_folder.lineage import ABANDONED, Event
from modernenc.saved_config import CONFIG, from_plain, load, save

log = logging.getLogger(__name__)


def prepare_rollback(run: Run, checkpoint: Checkpoint, event: Event) -> Checkpoint:
    """Turn a checkpoint into the start of a new rollback, numbered above all earlier ones."""
    keys = [checkpoints.sort_key(path) for path in (Path(run.run_dir) / checkpoints.FOLDER).glob("*.ckpt")]
    known = [rollbacks for rollbacks, _ in keys if rollbacks < math.inf]
    number = 1 + int(max([run.rollbacks, *known]))
    event = replace(event, abandoned=f"{ABANDONED}/{number}")
    logger = asdict(new_id(run.logger))
    return replace(checkpoint, run={**checkpoint.run, "rollbacks": number, "logger": logger}, event=event)


def record_start(run: Run, plan: str, checkpoint: Checkpoint | None, event: Event, ranks: int) -> None:
    """Record in the run folder how the run starts or goes on; `plan` is the text of its plan.

    A rollback is committed once its start checkpoint exists. The remaining steps are idempotent: if this process dies, the next
    resume repeats them, until the configuration is written.
    """
    run_dir = Path(run.run_dir)
    position = checkpoint.state.tokens_seen if checkpoint else 0
    if checkpoint is None or event.event != "rollback":
        if event.event != "resume" or checkpoint is None:
            _point_latest(run_dir)
        else:
            _update_config(run)
        lineage.add(run_dir, event, ranks, position)
        return
    number = checkpoint.run["rollbacks"]
    start = run_dir / checkpoints.FOLDER / f"{checkpoints.start_of_rollback(number)}.ckpt"
    if checkpoints.sort_key(start) != (number, position):
        checkpoints.write(checkpoint, start)
    archive_after(run_dir, number, position)
    if all(entry.get("abandoned") != event.abandoned for entry in lineage.read(run_dir)):
        lineage.add(run_dir, event, ranks, position)
    write_plan(run_dir, plan)
    save(from_plain(checkpoint.run, run.run_dir))


def _update_config(run: Run) -> None:
    """Keep where the corpus is now, and write the whole configuration if its file is missing or damaged."""
    try:
        saved = load(Path(run.run_dir))
    except (FileNotFoundError, ValueError):  # the run was resumed by its checkpoint's
        save(run)
    else:
        if saved.data.root != run.data.root:
            save(replace(saved, run_dir=run.run_dir, data=replace(saved.data, root=run.data.root)))


def _point_latest(run_dir: Path) -> None:
    """Point the link `latest`, beside the run, to it, where the file system has links and may be written."""
    latest = run_dir.parent / "latest"
    try:
        partial_path(latest).unlink(missing_ok=True)
        partial_path(latest).symlink_to(run_dir.name)
        partial_path(latest).replace(latest)
    except OSError as error:
        log.warning("%s does not point to this run: %s", latest, error.strerror)


def archive_after(run_dir: Path, number: int, tokens_seen: int) -> None:
    """Move what a rollback abandons into its archive: checkpoints after a position, and copies of configuration and tables."""
    folder = run_dir / ABANDONED / str(number)
    (folder / checkpoints.FOLDER).mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, "metrics.csv", "validation.csv", "evaluations.csv"):
        if (run_dir / name).exists() and not (folder / name).exists():
            shutil.copyfile(run_dir / name, folder / (name + ".tmp"))
            (folder / (name + ".tmp")).rename(folder / name)
    for path in (run_dir / checkpoints.FOLDER).glob("*.ckpt"):
        rollbacks, tokens = checkpoints.sort_key(path)
        if tokens > tokens_seen and rollbacks != number:
            for part in checkpoints.files_of(path):
                part.rename(folder / checkpoints.FOLDER / part.name)
