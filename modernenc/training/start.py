"""Start a new run, from the start of its curriculum or as a branch of another run."""

import logging
from dataclasses import replace
from pathlib import Path

from modernenc.config import Run
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.planning.branch import begin_branch
from modernenc.planning.checks import check_settings
from modernenc.planning.model_checks import check_backbone, check_disk, check_init, check_optim
from modernenc.planning.tables import plan_text
from modernenc.reporting import page
from modernenc.run_folder import lineage
from modernenc.run_folder.create import create
from modernenc.run_folder.lineage import Event
from modernenc.saved_config import from_plain
from modernenc.training import ranks
from modernenc.training.fit import fit
from modernenc.training.hardware import check_hardware

log = logging.getLogger(__name__)


def start(run: Run, curriculum: Curriculum, corpus: Corpus, numbered: bool) -> str:
    """Check what the earlier checks could not without torch, create the run folder, train, write the report; return the folder.

    With `numbered`, the folder may get a number as suffix. Errors are those of the checks, of `create` and of `fit`.
    """
    check_hardware(run)
    check_backbone(run)
    check_disk(run)
    check_optim(run)
    if not run.branch_from:
        check_init(run, corpus)
    run = _with_absolute_paths(run, corpus)
    parent = Path(run.branch_from).resolve()
    checkpoint, event = None, Event("start")
    if run.branch_from:
        checkpoint, event = begin_branch(run, corpus), Event("branch", str(parent))
        run = from_plain(checkpoint.run)
        curriculum = check_settings(run)  # finished phases are now those of the checkpoint
    plan = plan_text(run, curriculum)
    if ranks.is_rank_zero():  # the folder's name holds the time; the other ranks learn it when they synchronise
        run = create(run, plan, checkpoint, numbered, corpus.small_files())
        if checkpoint is not None and (parent.parent.parent / lineage.LINEAGE).is_file():
            into = Event("branched", parent.stem, into=str(Path(run.run_dir).resolve()))
            try:
                lineage.add(parent.parent.parent, into, 1, checkpoint.state.tokens_seen)
            except OSError as error:
                log.warning("the lineage of %s could not record its branch: %s", parent.parent.parent, error)
    fit(run, curriculum, corpus, plan, checkpoint, event)
    if ranks.is_rank_zero():
        log.info("report: %s", page.write(run))
    return run.run_dir


def _with_absolute_paths(run: Run, corpus: Corpus) -> Run:
    """Return the run with absolute paths, because it may be resumed from another working directory."""
    tasks = {
        name: replace(task, train=str(Path(task.train).resolve()), validation=str(Path(task.validation).resolve()))
        for name, task in run.tasks.items()
    }
    init = replace(run.init, source=str(Path(run.init.source).resolve())) if run.init.source else run.init
    return replace(run, data=replace(run.data, root=str(corpus.store)), tasks=tasks, init=init)
