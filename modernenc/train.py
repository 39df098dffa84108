"""Train a recipe: `python -m modernenc.train +recipe=NAME [KEY=VALUE ...]`.

See it first with `python -m modernenc.plan`, rehearse it in a minute with `rehearse=CORPUS`, branch off another run with
`+from=CKPT`, train several variants in turn with `--multirun KEY=A,B`. Go on with a run: `python -m modernenc.resume RUN_DIR`.
"""

import logging
import sys
from pathlib import Path

from modernenc import lineage, ranks
from modernenc.cli import given, run
from modernenc.config import Run, register

log = logging.getLogger(__name__)


def main(config: Run) -> None:
    """Check the run, then train it in a new folder, from the start or from another run's checkpoint."""
    from modernenc.checks import check_backbone, check_hardware, check_init, check_optim, check_run, check_settings

    curriculum, corpus = check_run(config)
    check_hardware(config)
    check_backbone(config)
    check_optim(config)
    if not config.branch_from:
        check_init(config, corpus)

    from modernenc.data.loader import open_mixes
    from modernenc.fit import fit, start  # torch and Lightning take seconds to import: mistakes are told before

    open_mixes(config, corpus)
    config.data.root = str(corpus.store)  # a run may be resumed from another folder
    for task in config.tasks.values():
        task.train, task.validation = (str(Path(path).resolve()) for path in (task.train, task.validation))
    if config.init.source:
        config.init.source = str(Path(config.init.source).resolve())
    parent = Path(config.branch_from).resolve()
    content, event = None, {"event": "start", "checkpoint": ""}
    if config.branch_from:
        from modernenc.branch import branched

        content = branched(config, corpus)
        curriculum = check_settings(config)  # phases that are done are the checkpoint's now
        event = {"event": "branch", "checkpoint": str(parent)}
    if ranks.is_first():  # the folder's name holds the time: the other ranks learn of it when they meet
        start(config, curriculum, content, numbered=not given("run_dir"))
        if content is not None and (parent.parent.parent / lineage.LINEAGE).is_file():
            into = {"event": "branched", "checkpoint": parent.stem, "into": str(Path(config.run_dir).resolve())}
            try:
                lineage.add(parent.parent.parent, into, 1, content["state"]["tokens_seen"])
            except OSError as error:
                log.warning("%s does not learn of its branch: %s", parent.parent.parent, error)
    fit(config, curriculum, corpus, content, event)


def _from_where_it_leads_now(argument: str) -> str:
    """`+from=` without links on its way: each branch of a --multirun makes itself the `latest` of its folder."""
    key, _, value = argument.partition("=")
    return f"{key}={Path(value).resolve()}" if key == "+from" and Path(value).exists() else argument


if __name__ == "__main__":
    sys.argv = [_from_where_it_leads_now(argument) for argument in sys.argv]
    register()
    run(Run, ("recipe",), "train", main)
    ranks.leave()
