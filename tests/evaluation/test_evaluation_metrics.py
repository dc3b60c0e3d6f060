"""Figures of merit agree with scikit-learn and with the slow, obvious way of computing them."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss, mean_absolute_error, mean_squared_error, r2_score

from plora_ray.evaluation import metrics
from plora_ray.evaluation.baselines import LabelHistory
from plora_ray.evaluation.comparison import POPULATION, WITH_USER, compare

GENERATOR = np.random.default_rng(0)


@pytest.fixture
def users() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 40, 300)


def test_classification_scores_are_those_of_scikit_learn() -> None:
    labels = GENERATOR.integers(0, 3, 200)
    log_probabilities = metrics.log_softmax(GENERATOR.normal(size=(200, 3)) * 3)
    scores, chosen = metrics.classification_scores(log_probabilities, labels), log_probabilities.argmax(axis=1)
    assert scores.accuracy == pytest.approx(accuracy_score(labels, chosen))
    assert scores.macro_f1 == pytest.approx(f1_score(labels, chosen, average="macro"))
    assert scores.nll == pytest.approx(log_loss(labels, np.exp(log_probabilities)))


def test_macro_f1_leaves_out_classes_that_no_label_has() -> None:
    labels = np.array([0, 0, 1, 1])
    log_probabilities = np.log(np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]))
    assert metrics.classification_scores(log_probabilities, labels).macro_f1 == pytest.approx((1.0 + 2 / 3) / 2)


def test_regression_scores_are_those_of_scikit_learn() -> None:
    labels, predicted = GENERATOR.normal(size=(2, 100))
    totals = metrics.RegressionTotals()
    totals.add(predicted, labels)
    scores = totals.scores()
    assert scores.mse == pytest.approx(mean_squared_error(labels, predicted))
    assert scores.mae == pytest.approx(mean_absolute_error(labels, predicted))
    assert scores.r2 == pytest.approx(r2_score(labels, predicted))


@pytest.mark.parametrize("pieces", [1, 7])
def test_scores_added_up_in_pieces_are_those_of_all_rows(pieces: int) -> None:
    generator = np.random.default_rng(7)
    labels, values = generator.integers(0, 5, 400), generator.normal(1000, 1, 400)
    log_probabilities = metrics.log_softmax(generator.normal(size=(400, 5)))
    predicted = values + generator.normal(size=400)
    classes, numbers = metrics.ClassificationTotals(5), metrics.RegressionTotals()
    for rows in np.array_split(np.arange(400), pieces):
        classes.add(log_probabilities[rows], labels[rows])
        numbers.add(predicted[rows], values[rows])
    scores, errors = classes.scores(), numbers.scores()
    assert scores.macro_f1 == pytest.approx(f1_score(labels, log_probabilities.argmax(axis=1), average="macro"))
    assert scores.nll == pytest.approx(log_loss(labels, np.exp(log_probabilities)))
    assert errors.r2 == pytest.approx(r2_score(values, predicted), abs=1e-9)
    assert errors.mae == pytest.approx(mean_absolute_error(values, predicted))


def test_the_interval_of_many_users_needs_no_draws_and_is_the_bootstraps(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(8)
    rows = generator.integers(1, 9, 3000)
    sums = rows[:, None] * generator.normal(1, 2, (3000, 2)) + generator.normal(size=(3000, 2))
    drawn = metrics.bootstrap_ratios(sums, rows)
    monkeypatch.setattr(metrics, "NORMAL_ABOVE_USERS", 100)
    for (low, high), (low_drawn, high_drawn) in zip(metrics.bootstrap_ratios(sums, rows), drawn, strict=True):
        assert high - low == pytest.approx(high_drawn - low_drawn, rel=0.1)
        assert (low + high) / 2 == pytest.approx((low_drawn + high_drawn) / 2, abs=0.1 * (high - low))


def test_the_bootstrap_draws_whole_users(users: np.ndarray) -> None:
    values = GENERATOR.normal(size=len(users)) + users  # rows of a user are alike, so users are what varies
    means, generator = [], np.random.default_rng(5)
    for _ in range(600):
        drawn = generator.choice(np.unique(users), len(np.unique(users)))
        means.append(np.concatenate([values[users == user] for user in drawn]).mean())
    low, high = metrics.bootstrap_by_user(values, users)
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.6)
    by_rows = 1.96 * values.std() / np.sqrt(len(values))
    assert (high - low) / 2 > 1.5 * by_rows


def test_the_bootstrap_is_the_same_in_small_pieces(users: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    values = GENERATOR.normal(size=len(users))
    whole = metrics.bootstrap_by_user(values, users)
    monkeypatch.setattr(metrics, "BOOTSTRAP_DRAWS_AT_ONCE", 100)
    assert metrics.bootstrap_by_user(values, users) == pytest.approx(whole, rel=0.2, abs=0.02)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator, held = np.random.default_rng(1), 0
    for _ in range(100):
        users = np.repeat(np.arange(60), 4)
        values = np.repeat(generator.normal(size=60), 4) + generator.normal(size=240)
        low, high = metrics.bootstrap_by_user(values, users)
        held += low <= 0 <= high
    assert 88 <= held <= 100


def test_means_over_users_count_every_user_once(users: np.ndarray) -> None:
    generator = np.random.default_rng(9)
    labels = generator.integers(0, 2, len(users))
    log_probabilities = metrics.log_softmax(generator.normal(size=(len(users), 2)))
    found = compare(WITH_USER, {WITH_USER: log_probabilities}, labels, users, "classification").predictors[WITH_USER].by_user
    nll = metrics.row_nll(log_probabilities, labels)
    assert found["nll"] == pytest.approx(np.mean([nll[users == user].mean() for user in set(users.tolist())]))


def test_a_gain_is_positive_when_the_subject_is_better_and_is_paired_by_row(users: np.ndarray) -> None:
    labels = GENERATOR.integers(0, 2, len(users))
    right = np.log(np.where(np.eye(2)[labels] > 0, 0.9, 0.1))
    unsure = np.log(np.full((len(users), 2), 0.5))
    found = compare(WITH_USER, {WITH_USER: right, POPULATION: unsure}, labels, users, "classification")
    nll = found.gains[POPULATION]["nll"]
    assert (nll.mean, nll.low, nll.high) == pytest.approx((np.log(0.9 / 0.5),) * 3)  # the same for every row: no uncertainty
    assert found.gains[POPULATION]["accuracy"].mean == pytest.approx((labels == 1).mean())
    np.testing.assert_allclose(found.user_gains, np.log(0.9 / 0.5), rtol=1e-6)


def test_the_label_prior_draws_a_users_labels_towards_everybodys() -> None:
    history = LabelHistory.of(np.array([0, 1]), np.array([0, 1]), np.array([6, 2]), users=3, outputs=2, task="classification")
    np.testing.assert_allclose(history.overall, [0.7, 0.3])
    np.testing.assert_allclose(np.exp(history.label_prior(np.array([0, 1, 2]))), [[7.4 / 8, 0.6 / 8], [1.4 / 4, 2.6 / 4], [0.7, 0.3]])
    np.testing.assert_allclose(np.exp(history.majority(np.array([1]))), [[0.7, 0.3]])


def test_the_label_prior_of_a_regression_is_a_shrunken_mean() -> None:
    history = LabelHistory.of(np.array([0, 1]), np.array([4.0, 1.0]), np.array([3, 1]), users=3, outputs=1, task="regression")
    np.testing.assert_allclose(history.overall, [13 / 4])
    np.testing.assert_allclose(history.label_prior(np.array([0, 1, 2])), [(12 + 6.5) / 5, (1 + 6.5) / 3, 13 / 4])


def test_a_new_users_label_prior_knows_only_the_given_examples() -> None:
    history = LabelHistory.of(np.array([0, 1]), np.array([0, 1]), np.array([6, 2]), users=2, outputs=2, task="classification")
    narrow = history.restricted_to(np.array([1]), np.array([0]))
    np.testing.assert_allclose(narrow.by_user, [[0, 0], [1, 0]])
    np.testing.assert_allclose(narrow.overall, history.overall)
