"""How sure a score is: over seeds by Student's t, over held-out items by the bootstrap (Efron 1979).

The two are independent sources of error, so that variances add. Models are compared on the same items: what is resampled is
the difference, in which the difficulty of an item cancels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from modernenc.evaluation.metrics import Predictions, draw, resampled, scores_of

RESAMPLES = 1_000
NORMAL = 1.96
"""Standard errors in half of an interval of 95 %."""


@dataclass(frozen=True)
class ScoreEstimate:
    """A score and half of its 95 % interval."""

    score: float
    seeds: int
    deviation: float
    """Standard deviation over the seeds; 0 for a single one."""
    seed_error: float
    """Half of the interval over seeds: 0 for a single one, of which nothing is known."""
    item_error: float
    """Half of the interval over items."""

    @property
    def error(self) -> float:
        """Half of the interval over both."""
        return float(np.hypot(self.seed_error, self.item_error))


def estimate(metrics: Sequence[str], runs: Sequence[Predictions]) -> ScoreEstimate:
    """Return the mean score over runs of different seeds on the same items; a score is the mean of its metrics."""
    scores = [mean(scores_of(metrics, run).values()) for run in runs]
    return ScoreEstimate(
        mean(scores), len(runs), _deviation(scores), half_interval(scores), NORMAL * float(_resample(metrics, runs).std())
    )


def difference(metrics: Sequence[str], ones: Sequence[Predictions], others: Sequence[Predictions]) -> ScoreEstimate:
    """Return by how much one model's mean score is above another's, on the same items."""
    first, second = ([mean(scores_of(metrics, run).values()) for run in runs] for runs in (ones, others))
    items = NORMAL * float((_resample(metrics, ones) - _resample(metrics, others)).std())
    spread = float(np.hypot(half_interval(first), half_interval(second)))
    return ScoreEstimate(mean(first) - mean(second), min(len(ones), len(others)), 0.0, spread, items)


def average(estimates: Sequence[ScoreEstimate]) -> ScoreEstimate:
    """Return the mean of the scores of different tasks, whose errors are independent."""
    count = len(estimates)

    def combine(errors: Sequence[float]) -> float:
        return float(np.sqrt(np.square(errors).sum()) / count)

    return ScoreEstimate(
        mean(one.score for one in estimates),
        min(one.seeds for one in estimates),
        combine([one.deviation for one in estimates]),
        combine([one.seed_error for one in estimates]),
        combine([one.item_error for one in estimates]),
    )


def _deviation(scores: Sequence[float]) -> float:
    return stdev(scores) if len(scores) > 1 else 0.0


def half_interval(scores: Sequence[float]) -> float:
    """Return half of the 95 % interval of the mean of a few scores, by Student's t; 0 for a single one."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(scores) - 1)) * _deviation(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0


def _resample(metrics: Sequence[str], runs: Sequence[Predictions]) -> np.ndarray:
    """Return the mean score over runs under each resample. The resamples of as many items are the same at every call."""
    weights = draw(runs[0], RESAMPLES)
    return np.mean([[resampled(metric, run, weights) for metric in metrics] for run in runs], axis=(0, 1))
