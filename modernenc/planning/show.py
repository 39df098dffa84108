"""Check all that training would check, except for the hardware, and print the plan."""

import json
from pathlib import Path

from modernenc.config import Run
from modernenc.curriculum import Curriculum
from modernenc.data.blocks import Corpus
from modernenc.model.init_source import check_source, rate_note, read_source
from modernenc.planning.branch import begin_branch
from modernenc.planning.checks import check_run, check_settings
from modernenc.planning.measure import tokens_per_second
from modernenc.planning.model_checks import check_backbone, check_init, check_optim
from modernenc.planning.sizes import corpus_of
from modernenc.planning.summary import summarize
from modernenc.planning.tables import comparison_text, estimates_text, plan_text
from modernenc.saved_config import from_plain


def show(run: Run, as_json: bool, measured: bool, against: str) -> Curriculum:
    """Print the plan of a run, or its comparison with another recipe, and return the curriculum.

    Errors are those that the run would raise.
    """
    check_backbone(run)
    check_optim(run)
    corpus = corpus_of(run.data)
    run, notes = _check_with(corpus, run) if corpus else (run, _check_without_corpus(run))
    curriculum = check_settings(run)
    if against:
        print(comparison_text(run, against))
        return curriculum
    summary = summarize(run, curriculum, corpus, tokens_per_second(run) if measured else None)
    summary["warnings"] = [*notes, *summary["warnings"]]
    print(json.dumps(summary, indent=1) if as_json else f"{plan_text(run, curriculum)}\n{estimates_text(run, summary)}")
    return curriculum


def _check_with(corpus: Corpus, run: Run) -> tuple[Run, list[str]]:
    """Open what the run would open, with the errors that it would raise; return the run, and notes on its first weights.

    A branch is returned with the finished phases of its checkpoint.
    """
    check_run(run)
    if run.branch_from:
        return from_plain(begin_branch(run, corpus).run), []
    return run, check_init(run, corpus)


def _check_without_corpus(run: Run) -> list[str]:
    """Return notes on what a plan without a corpus omits; the first weights are checked if they exist."""
    notes = [f"data.root={run.data.root}: there is no corpus yet; {run.data.hint}"]
    if run.branch_from:
        notes.append(f"+from={run.branch_from}: not checked without the corpus")
    elif run.init.source and not Path(run.init.source).exists():
        notes.append(f"init.source={run.init.source}: nothing exists there yet; a run needs it")
    elif run.init.source:
        source = read_source(Path(run.init.source), run)
        notes += [*check_source(source, run), rate_note(source, run)]
    return notes
