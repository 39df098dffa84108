"""Metrics of predictions: scikit-learn's, SciPy's and seqeval's, and the same over resampled items for confidence intervals.

A resample gives each item a weight, the number of times that it was drawn. Under weights all metrics here are functions of
weighted sums, so that a thousand resamples are a few matrix products.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

Predictions = dict[str, list[Any]]
"""What the metrics need of all items: `labels` and `predictions`, and the `groups` of those that belong together; `counts` of
right, predicted and true entities; or, of each document, its summed `loss` and the number of its `targets`."""
Scores = dict[str, float]


class Unit(NamedTuple):
    """How the scores of a metric are written."""

    name: str
    scale: float
    digits: int
    over: str
    """What the interval is over."""
    lower_is_better: bool = False


FRACTION = Unit("scores x 100", 100, 1, "held-out items")
UNITS = {
    "loss": Unit("nats per token", 1, 3, "documents", lower_is_better=True),
    "tokens_per_s": Unit("tokens a second", 1, 0, "turns"),
}
"""Units of the metrics that are no fractions."""


def scores_of(metrics: Sequence[str], of: Predictions) -> Scores:
    """Return each metric of the predictions, on the scale of -1 or 0 to 1."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn import metrics as sklearn

    def entity_f1() -> float:
        right, predicted, true = np.array(of["counts"]).sum(0)
        return 2 * right / max(1, predicted + true)

    labels, predictions = of.get("labels", []), of.get("predictions", [])
    constant = len(set(predictions)) == 1 or not np.isfinite(np.array(predictions, np.float64)).all()
    functions = {
        "accuracy": lambda: sklearn.accuracy_score(labels, predictions),
        "f1": lambda: sklearn.f1_score(labels, predictions, zero_division=0),  # pyright: ignore[reportArgumentType]
        "macro_f1": lambda: sklearn.f1_score(labels, predictions, average="macro", zero_division=0),  # pyright: ignore[reportArgumentType]
        "matthews": lambda: sklearn.matthews_corrcoef(labels, predictions),
        "pearson": lambda: 0.0 if constant else pearsonr(labels, predictions)[0],
        "spearman": lambda: 0.0 if constant else spearmanr(labels, predictions)[0],
        "entity_f1": entity_f1,
        "loss": lambda: sum(of["loss"]) / sum(of["targets"]),
        "exact_match": lambda: float(_exact(of)[0].mean()),
    }
    scores = {metric: float(functions[metric]()) if metric in functions else float(np.mean(of[metric])) for metric in metrics}
    return {metric: score if np.isfinite(score) else _worst(metric) for metric, score in scores.items()}


def draw(of: Predictions, resamples: int) -> Float[np.ndarray, "resamples items"]:
    """Return the weights of resamples, the same for as many items. Items of a group are drawn together."""
    group_of = np.unique(of["groups"], return_inverse=True)[1] if "groups" in of else np.arange(len(next(iter(of.values()))))
    count = int(group_of.max()) + 1
    weights = np.random.default_rng(count).multinomial(count, np.full(count, 1 / count), resamples)
    return weights.astype(np.float64)[:, group_of]


def _exact(of: Predictions) -> tuple[Float[np.ndarray, " groups"], Integer[np.ndarray, " groups"]]:
    """Return for each group whether all of its predictions are right, and its first item."""
    _, first, group_of = np.unique(of["groups"], return_index=True, return_inverse=True)
    wrong = np.bincount(group_of, np.array(of["labels"]) != np.array(of["predictions"]))
    return (wrong == 0).astype(np.float64), first


def _worst(metric: str) -> float:
    """Return the score of predictions that are no numbers, as those of a model that has diverged."""
    return np.inf if UNITS.get(metric, FRACTION).lower_is_better else 0.0


def resampled(metric: str, of: Predictions, weights: Float[np.ndarray, "resamples items"]) -> Float[np.ndarray, " resamples"]:
    """Return a metric under each resample. Any metric that is not known is a mean of values that `of` holds under its name."""
    if metric == "entity_f1":
        right, predicted, true = (weights @ np.array(of["counts"], np.float64)).T
        return 2 * right / np.maximum(1, predicted + true)
    if metric == "loss":
        return weights @ np.array(of["loss"]) / (weights @ np.array(of["targets"]))
    if metric in ("pearson", "spearman"):
        return _correlation(metric, of, weights)
    if metric == "exact_match":
        exact, first = _exact(of)
        return weights[:, first] @ exact / weights[:, first].sum(1)
    if metric not in ("accuracy", "f1", "macro_f1", "matthews"):
        return weights @ np.array(of[metric], np.float64) / weights.sum(1)
    if metric == "accuracy":  # without a table of all pairs of labels, of which there may be many
        return weights @ (np.array(of["labels"]) == np.array(of["predictions"])) / weights.sum(1)
    confusion = _confusion(of, weights)
    right, true, predicted = confusion.diagonal(axis1=1, axis2=2), confusion.sum(2), confusion.sum(1)
    total = true.sum(1)
    if metric == "matthews":  # Gorodkin 2004, equation 8
        covariance = right.sum(1) * total - (true * predicted).sum(1)
        spread = (total**2 - (true**2).sum(1)) * (total**2 - (predicted**2).sum(1))
        return np.where(spread > 0, covariance / np.sqrt(np.maximum(spread, 1e-300)), 0.0)
    f1 = 2 * right / np.maximum(1, true + predicted)
    if metric == "f1":
        return f1[:, -1]
    present = (true + predicted) > 0
    return (f1 * present).sum(1) / present.sum(1)


def _confusion(of: Predictions, weights: Float[np.ndarray, "resamples items"]) -> Float[np.ndarray, "resamples labels labels"]:
    """Return how often each label (second axis) was taken for each other (last axis) under each resample."""
    names, codes = np.unique([*of["labels"], *of["predictions"]], return_inverse=True)
    labels, predictions = codes[: len(of["labels"])], codes[len(of["labels"]) :]
    cells = np.zeros((len(labels), len(names) ** 2))
    cells[np.arange(len(labels)), labels * len(names) + predictions] = 1
    return (weights @ cells).reshape(-1, len(names), len(names))


def _correlation(
    metric: str, of: Predictions, weights: Float[np.ndarray, "resamples items"]
) -> Float[np.ndarray, " resamples"]:
    """Return the correlation of values or, for Spearman's, of their ranks among all items, under each resample."""
    from scipy.stats import rankdata

    x, y = (np.array(of[key], np.float64) for key in ("labels", "predictions"))
    if not np.isfinite(y).all():
        return np.zeros(len(weights))
    if metric == "spearman":
        x, y = rankdata(x), rankdata(y)
    x, y = x - x.mean(), y - y.mean()
    total = weights.sum(1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    covariance = weights @ (x * y) / total - mean_x * mean_y
    spread = (weights @ x**2 / total - mean_x**2) * (weights @ y**2 / total - mean_y**2)
    return np.where(spread > 1e-24, covariance / np.sqrt(np.maximum(spread, 1e-300)), 0.0)
