"""The results of a sweep: one table and one plot of the swept settings against the validation loss."""

import csv
import math
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as ScreenTable

from modernenc.cli import Outcome
from modernenc.run_folder.tables import ALL, Table

TABLE, PLOT = "sweep.csv", "sweep.png"


def write(outcomes: list[Outcome], folder: Path) -> None:
    """Print the results of all runs of a sweep, the best one marked, and write them as a table and a plot into a folder."""
    keys = swept_keys(outcomes)
    rows = [
        {
            **{key: _settings(one).get(key, "") for key in keys},
            "validation": _last_loss(one),
            "run": one.result,
            "error": one.error,
        }
        for one in outcomes
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / TABLE).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    best = min((row["validation"] for row in rows if math.isfinite(row["validation"])), default=math.nan)
    table = ScreenTable(title="sweep: validation loss, nats per token", title_justify="left", box=SIMPLE_HEAD)
    for name in (*keys, "validation", "run"):
        table.add_column(name, justify="right" if name == "validation" else "left", overflow="fold")
    for row in rows:
        loss = f"{row['validation']:.3f}{'*' if row['validation'] == best else ''}" if row["run"] else "-"
        table.add_row(*(row[key] for key in keys), loss, row["run"] or row["error"])
    Console(width=100).print(table)
    print(f"* the lowest; {folder / TABLE} and {folder / PLOT} hold the same")
    _draw(keys, rows, folder / PLOT)


def swept_keys(outcomes: list[Outcome]) -> list[str]:
    """Return the keys whose values differ between runs, in the order of the command line."""
    settings = [_settings(one) for one in outcomes]
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({one.get(key) for one in settings}) > 1]


def _settings(outcome: Outcome) -> dict[str, str]:
    pairs = (override.partition("=") for override in outcome.overrides)
    return {key.lstrip("+"): value for key, _, value in pairs}


def _last_loss(outcome: Outcome) -> float:
    """Return the last validation loss of a run, at its first length and mask ratio; not a number if it has none."""
    rows = (
        [row for row in Table(Path(outcome.result) / "validation.csv").read() if row["source"] == ALL] if outcome.result else []
    )
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    return float(last[0]["loss"]) if last else math.nan


def _draw(keys: list[str], rows: list[dict], path: Path) -> None:
    """Plot the loss against the swept setting, on a logarithmic axis where its values span a factor of ten."""
    matplotlib.use("Agg")
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    labels = [", ".join(f"{row[key]}" for key in keys) for row in rows]
    try:
        places = [float(label) for label in labels]
    except ValueError:
        places = list(range(len(rows)))
        axis.set_xticks(places, labels, rotation=20, ha="right")
    else:
        if min(places) > 0 and max(places) >= 10 * min(places):
            axis.set_xscale("log")
    axis.plot(places, [row["validation"] for row in rows], "o-", color="#1f4e79")
    axis.set_xlabel(", ".join(keys))
    axis.set_ylabel("validation loss (nats per token)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
