"""Metrics and intervals are those of the libraries and of the textbooks."""

import numpy as np
import pytest

from modernenc.evaluation.intervals import average, difference, estimate
from modernenc.evaluation.metrics import draw, resampled, scores_of


def _predictions(kind: str, items: int, seed: int) -> dict[str, list]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3 if kind == "macro_f1" else 2, items)
    if kind in ("pearson", "spearman"):
        values = rng.normal(size=items)
        return {"labels": np.round(values, 1).tolist(), "predictions": (values + rng.normal(size=items)).tolist()}
    if kind == "entity_f1":
        counts = rng.integers(0, 3, (items, 1)) + np.array([[0, 1, 2]])
        return {"counts": counts.tolist()}
    if kind == "loss":
        return {"loss": (rng.random(items) * 9).tolist(), "targets": rng.integers(1, 5, items).tolist()}
    wrong = rng.random(items) < 0.3
    return {"labels": labels.tolist(), "predictions": np.where(wrong, (labels + 1) % (labels.max() + 1), labels).tolist()}


KINDS = ("accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman", "entity_f1", "loss")


@pytest.mark.parametrize("metric", KINDS)
def test_a_resample_with_every_item_once_is_the_metric_of_the_library(metric):
    of = _predictions(metric, 200, 0)
    assert resampled(metric, of, np.ones((1, 200)))[0] == pytest.approx(scores_of([metric], of)[metric], abs=1e-12)


@pytest.mark.parametrize("metric", sorted({*KINDS} - {"spearman"}))  # whose ranks are those among all items
def test_a_resample_is_the_metric_of_the_items_drawn(metric):
    of = _predictions(metric, 60, 1)
    drawn = np.random.default_rng(2).integers(0, 60, 60)
    mine = {key: [values[number] for number in drawn] for key, values in of.items()}
    weights = np.bincount(drawn, minlength=60)[None].astype(float)
    assert resampled(metric, of, weights)[0] == pytest.approx(scores_of([metric], mine)[metric], abs=1e-12)


def test_predictions_without_a_difference_have_a_score_of_zero():
    same = {"labels": [1.0, 2.0, 3.0, 1.0], "predictions": [0.5] * 4}
    assert scores_of(["pearson", "spearman"], same) == {"pearson": 0.0, "spearman": 0.0}
    assert resampled("pearson", same, np.ones((1, 4))).tolist() == [0.0]
    one = {"labels": [0, 1, 1, 0], "predictions": [1] * 4}
    assert scores_of(["matthews"], one)["matthews"] == resampled("matthews", one, np.ones((1, 4)))[0] == 0.0


def test_an_exact_match_is_a_question_of_which_all_answers_are_right():
    of = {"labels": [1, 0, 1, 1, 0], "predictions": [1, 0, 1, 0, 0], "groups": ["b", "b", "a", "a", "c"]}
    assert scores_of(["exact_match"], of) == {"exact_match": pytest.approx(2 / 3)}
    weights = draw(of, 500)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 2] == weights[:, 3]).all()  # drawn together
    weight_a, weight_b, weight_c = weights[:, 2], weights[:, 0], weights[:, 4]
    assert (weight_a + weight_b + weight_c == 3).all()
    assert resampled("exact_match", of, weights) == pytest.approx((weight_b + weight_c) / 3)


def test_intervals_are_students_over_seeds_and_binomial_over_items():
    runs = [_predictions("accuracy", 1_000, seed) for seed in range(5)]
    for run in runs:  # of other labels: only the right or wrong of an item counts
        run["predictions"] = [int(one == other) for one, other in zip(run["labels"], run["predictions"], strict=True)]
        run["labels"] = [1] * 1_000
    scores = [np.mean(run["predictions"]) for run in runs]
    found = estimate(["accuracy"], runs)
    assert found.score == pytest.approx(np.mean(scores))
    assert found.deviation == pytest.approx(np.std(scores, ddof=1))
    assert found.seed_error == pytest.approx(2.776445 * np.std(scores, ddof=1) / 5**0.5, rel=1e-6)  # t of 4 degrees, 97.5 %
    single = estimate(["accuracy"], runs[:1])
    share = scores[0]
    assert single.item_error == pytest.approx(1.96 * (share * (1 - share) / 1_000) ** 0.5, rel=0.08)
    assert (single.seed_error, single.error) == (0, single.item_error)
    assert average([found, found]).item_error == pytest.approx(found.item_error / 2**0.5)


def test_models_are_compared_item_by_item():
    rng = np.random.default_rng(0)
    worse = rng.random(2_000) < 0.5
    better = worse | (rng.random(2_000) < 0.03)  # right wherever the other is, and a little more
    one, other = ({"labels": [1] * 2_000, "predictions": right.astype(int).tolist()} for right in (better, worse))
    gap = difference(["accuracy"], [one], [other])
    assert gap.score == pytest.approx(better.mean() - worse.mean())
    assert gap.error < gap.score < estimate(["accuracy"], [one]).error  # neither interval alone could tell


def test_a_model_that_has_diverged_has_the_worst_score():
    diverged = {"labels": [1.0, 2.0, 3.0], "predictions": [float("nan")] * 3}
    assert scores_of(["pearson", "spearman"], diverged) == {"pearson": 0.0, "spearman": 0.0}
    assert resampled("pearson", diverged, np.ones((2, 3))).tolist() == [0.0, 0.0]
    assert scores_of(["loss"], {"loss": [float("nan")], "targets": [1]})["loss"] == np.inf


def test_accuracy_of_many_labels_needs_no_table_of_all_pairs():
    of = {"labels": list(range(3_000)), "predictions": [0] * 3_000}
    assert resampled("accuracy", of, np.ones((2, 3_000))) == pytest.approx(1 / 3_000)
