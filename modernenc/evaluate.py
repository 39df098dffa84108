"""Evaluate encoders: `python -m modernenc.evaluate SUITE MODEL ... [KEY=VALUE ...]`.

A MODEL is a run folder, a checkpoint, a Hugging Face folder or a name on the hub; NAME=PATH names it in the tables. Suites:

  mlm                loss on held-out text by source, length, position and context, and pseudo-perplexity
  glue, superglue    fine-tune on each task that --data has: a folder with train.tsv and dev.tsv (docs: evaluate)
  multiple_choice    the same for the layouts of SWAG, HellaSwag and COPA
  token              the same for words with tags, in CoNLL's layout
  classify           the same for any folder of yours
  retrieval          fine-tune to find texts by one vector each, beside BM25: sets in the layouts of BEIR, MLDR or CoSQA
  long_retrieval     the same, and by the length of the texts and of what is read of them
  code               the same for code, from text to code and from code to text
  colbert            the same by a vector of each token, with PyLate
  efficiency         tokens a second to hidden states on this machine

`python -m modernenc.evaluate --watch RUN_DIR [--once]` evaluates the checkpoints of a run as they appear, by the suites that
its recipe names in evaluate.suites, and adds their scores to its report.

Everything is kept in --out, cell by cell: the same command again goes on where it was, and several of them share the work.
KEY=VALUE changes a suite's settings, which are in conf/evaluate: lr=1e-4, epochs=3, tasks.CoLA.lr=3e-5.
"""

import argparse
import os
import re
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

from modernenc.cli import one_line_errors, take_allowed_code

SUITES = {
    "mlm": ("masked_lm", "masked_lm"),
    **dict.fromkeys(("glue", "superglue", "multiple_choice", "token", "classify"), ("fine_tuning", "cramming")),
    **dict.fromkeys(("retrieval", "code"), ("retrieval", "single_vector")),
    "long_retrieval": ("retrieval", "single_vector_long"),
    "colbert": ("colbert", "multi_vector"),
    "efficiency": ("efficiency", "efficiency"),
}
"""For each suite the module of `modernenc.suites` that makes its cells, and the settings that it has by default."""
WATCH = "--watch"
_LOWEST = 19
"""Priority of the process that watches, so that training has the cores first."""


def main() -> None:
    """Evaluate what the command line names."""
    take_allowed_code()
    if any(argument.partition("=")[0] == WATCH for argument in sys.argv):
        _watch()
        return
    parser = argparse.ArgumentParser(
        prog="python -m modernenc.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES, metavar="SUITE")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="models, and settings as KEY=VALUE")
    parser.add_argument("--data", default="data/eval", help="folder of the tasks, or of one, or hub:OWNER/NAME (%(default)s)")
    parser.add_argument("--tasks", default="", help="tasks to take, separated by commas; all by default")
    parser.add_argument("--settings", default="", help="settings: a name of conf/evaluate, or a YAML file")
    parser.add_argument("--seeds", type=int, default=3, help="how many times each cell is done (%(default)s)")
    parser.add_argument("--random", action="store_true", help="also evaluate each model with fresh weights")
    parser.add_argument("--published", action="store_true", help="also print what others have published for the tasks")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the best fine-tuned model of each task there")
    parser.add_argument("--jobs", type=int, default=0, help="processes that share the work; one for each GPU by default")
    parser.add_argument("--out", type=Path, default=Path("evaluations"), help="folder of the results (%(default)s)")
    arguments = parser.parse_intermixed_args()
    with one_line_errors():
        _evaluate(arguments)


def _watch() -> None:
    parser = argparse.ArgumentParser(prog="python -m modernenc.evaluate", description="Evaluate the checkpoints of a run.")
    parser.add_argument(WATCH, type=Path, metavar="RUN_DIR", help="evaluate its checkpoints as they appear")
    parser.add_argument("--once", action="store_true", help="only those that are there now")
    arguments = parser.parse_args()
    os.nice(_LOWEST - os.nice(0))
    with one_line_errors():
        from modernenc.evaluation.watch import watch

        watch(arguments.watch, arguments.once)


def _evaluate(arguments: argparse.Namespace) -> None:
    from modernenc.evaluation import cells, hub, kept, models, workers  # torch takes seconds to import
    from modernenc.installed import check_installed
    from modernenc.reporting import scores, scores_page

    check_installed("evaluate")
    if arguments.seeds < 1 or arguments.jobs < 0:
        raise ValueError(f"--seeds {arguments.seeds} --jobs {arguments.jobs}: expected 1 seed or more, and 0 jobs or more")
    if arguments.suite == "efficiency" and arguments.jobs > 1:
        raise ValueError(f"--jobs {arguments.jobs}: speeds are measured one at a time; leave it out")
    name, settings = SUITES[arguments.suite]
    suite = import_module(f"modernenc.suites.{name}")
    names = [field.name for field in fields(suite.SCHEMA)]
    keys = tuple(f"{key}{mark}" for key in names for mark in "=.")
    changes = [one for one in arguments.models if one.startswith(keys) and "=" in one]
    named = [one for one in arguments.models if one not in changes]
    for one in named:
        if re.fullmatch(r"[^/]+=([\d.e+-]+|\[.*\]|true|false)", one):
            raise ValueError(f"{one}: {arguments.suite} has no such setting; it has {', '.join(names)}")
    found = models.find_models(named, arguments.out)
    tasks = tuple(filter(None, arguments.tasks.split(",")))
    data = hub.local_folder(arguments.data, tasks, arguments.out)
    if arguments.random:
        found = [twin for model in found for twin in (model, models.random_twin(model, arguments.out))]
    request = cells.Request(
        arguments.suite,
        found,
        data,
        tasks,
        arguments.settings or settings,
        changes,
        arguments.seeds,
        bool(arguments.save),
    )
    made, notes = suite.make_cells(request)
    for option, given in (("--save", arguments.save), ("--tasks", arguments.tasks)):
        if given and name in ("masked_lm", "efficiency"):
            raise ValueError(f"{option} {given}: {arguments.suite} has neither tasks nor models that it trains; leave it out")
    made = list({(cell.name, cell.model.name): cell for cell in made}.values())
    if str(data) != arguments.data:
        notes = [f"{arguments.data} is in {data}", *notes]
    for note in () if workers.is_copy() else notes:
        print(note)
    if not made:
        raise ValueError(f"--data {arguments.data}: nothing to evaluate")
    (arguments.out / cells.CELLS).mkdir(parents=True, exist_ok=True)

    def report(result: cells.Measurement, left: int) -> None:
        score = ", ".join(f"{metric} {value:.3f}" for metric, value in result.scores.items())
        print(f"{result.model}, {result.task}, seed {result.seed}: {score} ({result.seconds:.0f} s); {left} left", flush=True)

    with workers.sharing(arguments.jobs):
        cells.run(made, arguments.out, report, workers.parent_lives)
    if workers.is_copy():
        return
    results = [result for cell in made if (result := cells.read(cell, arguments.out))]
    scores.show(arguments.suite, results)
    if arguments.published:
        scores.show_published(arguments.suite, results)
    if arguments.suite in ("mlm", "long_retrieval"):
        scores.show_curves(results)
    scores.write(arguments.out / f"{arguments.suite}.json", arguments.suite, results)
    scores_page.write(arguments.out / f"{arguments.suite}.html", arguments.suite, results)
    print(f"{arguments.out / arguments.suite}.html shows the same with plots, and {arguments.suite}.json has all digits")
    if arguments.save:
        trained = [cell for cell in made if isinstance(cell, kept.TrainingCell) and cell.keep]
        for folder in kept.save_best(trained, arguments.out, arguments.save):
            print(f"{folder} holds the best model")


if __name__ == "__main__":
    main()
