"""Figures of merit agree with scikit-learn and with the slow, obvious way of computing them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    f1_score,
    log_loss,
    mean_absolute_error,
    mean_squared_error,
    r2_score,
)

from plora_ray.adapters.labels import LabelSpace
from plora_ray.errors import ConfigError
from plora_ray.evaluation import metrics
from plora_ray.evaluation.baselines import LabelHistory
from plora_ray.evaluation.comparison import MAJORITY, POPULATION, WITH_USER, ComparisonTotals, compare
from plora_ray.evaluation.costs import Costs
from plora_ray.evaluation.page import comparison_table
from plora_ray.evaluation.plots import gain_over_time
from plora_ray.evaluation.user_gains import UserGains

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
    assert scores.brier == pytest.approx(brier_score_loss(labels, np.exp(log_probabilities), scale_by_half=False))
    assert scores.ordered is None and "kappa" not in metrics.as_json(scores)


def test_calibration_is_how_far_confidence_is_from_being_right_bin_by_bin() -> None:
    labels = GENERATOR.integers(0, 2, 3000)
    log_probabilities = metrics.log_softmax(GENERATOR.normal(size=(3000, 2)) * 2)
    confidence, right = np.exp(log_probabilities.max(axis=1)), log_probabilities.argmax(axis=1) == labels
    share, mean = calibration_curve(right, confidence, n_bins=metrics.ECE_BINS)
    counts = np.histogram(confidence, bins=np.linspace(0, 1, metrics.ECE_BINS + 1))[0]
    expected = (np.abs(share - mean) * counts[counts > 0]).sum() / 3000
    assert metrics.classification_scores(log_probabilities, labels).ece == pytest.approx(expected)


@pytest.mark.parametrize("pieces", [1, 4])
def test_classes_that_are_numbers_have_errors_in_their_units_and_a_quadratic_kappa(pieces: int) -> None:
    generator = np.random.default_rng(11)
    labels = generator.integers(0, 5, 300)
    log_probabilities = metrics.log_softmax(generator.normal(size=(300, 5)) + 2 * np.eye(5)[labels])
    totals = metrics.ClassificationTotals(5, LabelSpace("classification", ("1", "2", "3", "4", "5")).values)
    for rows in np.array_split(np.arange(300), pieces):
        totals.add(log_probabilities[rows], labels[rows])
    found, stars, chosen = totals.scores().ordered, labels + 1, log_probabilities.argmax(axis=1) + 1
    assert found is not None
    assert found.kappa == pytest.approx(cohen_kappa_score(stars, chosen, weights="quadratic"))
    assert found.mse == pytest.approx(mean_squared_error(stars, chosen)) and found.rmse == pytest.approx(found.mse**0.5)
    assert found.mae == pytest.approx(mean_absolute_error(stars, chosen))


def test_answers_that_agree_by_chance_alone_have_a_kappa_of_zero_and_no_rounding_error() -> None:
    totals = metrics.ClassificationTotals(3, np.array([1.0, 2.0, 3.0]))
    totals.add(np.log(np.tile([0.2, 0.1, 0.7], (30, 1))), np.random.default_rng(0).integers(0, 3, 30))
    ordered = totals.scores().ordered
    assert ordered is not None and ordered.kappa == 0.0


@pytest.mark.parametrize("classes", [("no", "yes"), ("0", "1"), ("1", "2", "x"), ("1", "2", "nan")])
def test_names_and_pairs_have_no_order(classes: tuple[str, ...]) -> None:
    assert LabelSpace("classification", classes).values is None


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
    assert found.user_gains is not None
    np.testing.assert_allclose(found.user_gains.means, np.log(0.9 / 0.5), rtol=1e-6)
    assert nll.p == 2.0 ** (1 - found.users) and found.user_gains.judged == 0, "what doesn't vary tells no noise"


def test_users_are_judged_by_the_noise_of_their_own_rows_whatever_the_pieces() -> None:
    generator = np.random.default_rng(12)
    users = np.repeat(np.arange(60), generator.integers(2, 30, 60))
    labels = generator.integers(0, 2, len(users))
    predicted = {name: metrics.log_softmax(generator.normal(size=(len(users), 2))) for name in (WITH_USER, POPULATION)}
    totals = ComparisonTotals(WITH_USER, "classification", 2)
    for part in np.array_split(np.arange(60), 7):
        rows = np.isin(users, part)
        totals.add({name: values[rows] for name, values in predicted.items()}, labels[rows], users[rows])
    gains = totals.user_gains()["nll"]
    per_row = metrics.row_nll(predicted[POPULATION], labels) - metrics.row_nll(predicted[WITH_USER], labels)
    by_user = [per_row[users == user] for user in range(60)]
    enough = [values for values in by_user if len(values) >= 5]
    np.testing.assert_allclose(gains.means, [values.mean() for values in by_user], atol=1e-5)
    noise = [stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) for values in enough]
    np.testing.assert_allclose(gains.noise[np.isfinite(gains.noise)], noise, rtol=1e-3)
    assert gains.judged == len(enough) < 60
    assert gains.harmed == pytest.approx(np.mean([values.mean() < -limit for values, limit in zip(enough, noise, strict=True)]))
    assert gains.worst_decile == pytest.approx(np.sort([values.mean() for values in by_user])[:6].mean(), abs=1e-5)


def test_users_who_get_the_populations_answer_are_judged_neither_helped_nor_harmed() -> None:
    gains = UserGains.of(np.array([0.0, 5.0, 1.0]), np.array([0.0, 5.0, 9.0]), np.array([5, 5, 5]))
    assert gains.judged == 2 and np.isnan(gains.noise[1]), "the second gains alike on every row, so nothing is known of its noise"
    assert gains.helped == gains.harmed == 0.0


def test_an_adapter_that_does_nothing_helps_and_harms_few_users_beyond_noise() -> None:
    for rows in (5, 40):
        noise = np.random.default_rng(13).normal(size=(20_000, rows))
        gains = UserGains.of(noise.sum(axis=1), (noise**2).sum(axis=1), np.full(20_000, rows))
        assert gains.harmed == pytest.approx(0.025, abs=0.004) and gains.helped == pytest.approx(0.025, abs=0.004)


def test_p_values_are_of_users_not_rows_and_hold_together(users: np.ndarray) -> None:
    generator = np.random.default_rng(14)
    labels = generator.integers(0, 2, len(users))
    predicted = {name: metrics.log_softmax(generator.normal(size=(len(users), 2))) for name in (WITH_USER, POPULATION, MAJORITY)}
    found = compare(WITH_USER, predicted, labels, users, "classification")
    raw = []
    for name in (POPULATION, MAJORITY):
        gain = metrics.row_nll(predicted[name], labels) - metrics.row_nll(predicted[WITH_USER], labels)
        without = [gain[users != user].mean() for user in np.unique(users)]
        count, shares = len(without), np.unique(users, return_counts=True)[1] / len(users)
        error = np.sqrt((count - 1) / count * np.square(np.array(without) - gain.mean()).sum())
        raw.append(2 * stats.t.sf(abs(gain.mean()) / error, 1 / np.square(shares).sum() - 1))
    expected = [min(1, 2 * raw[0]), raw[1]] if raw[0] <= raw[1] else [raw[0], min(1, 2 * raw[1])]
    expected = [max(value, min(1, 2 * min(raw))) for value in expected]
    assert [found.gains[name]["nll"].p for name in (POPULATION, MAJORITY)] == pytest.approx(expected, rel=1e-3)
    assert metrics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_mean_lies_within_its_interval_and_small_or_large_units_lose_no_figures() -> None:
    draw = np.random.default_rng(31)
    truth, owners = draw.normal(size=120), np.repeat(np.arange(20), 6)
    answers = {WITH_USER: truth + draw.normal(size=120) / 9, POPULATION: truth + draw.normal(size=120)}
    for unit in (1e-7, 1.0, 1e10, 1e20):
        found = compare(WITH_USER, {name: unit * values for name, values in answers.items()}, unit * truth, owners, "regression")
        gain, scores = found.gains[POPULATION]["mse"], found.predictors[WITH_USER].to_json()
        assert gain.low <= gain.mean <= gain.high
        assert scores["mse"] == pytest.approx(((answers[WITH_USER] - truth) ** 2).mean() * unit**2, rel=0.01)
        assert found.user_gains is not None and found.user_gains.judged == 20 and found.user_gains.helped == 0.25
        assert min(found.to_json()["user_gains"]["edges"]) < max(found.to_json()["user_gains"]["edges"])
    alone = compare(WITH_USER, {name: values[:6] for name, values in answers.items()}, truth[:6], owners[:6], "regression")
    only = alone.gains[POPULATION]["mse"]
    assert only.low <= only.mean <= only.high and gain_over_time({"1": alone}).startswith(b"\x89PNG")


def test_nothing_right_is_no_negative_zero() -> None:
    wrong = {name: np.log([[0.9, 0.1]] * 4) for name in (WITH_USER, POPULATION)}
    found = compare(WITH_USER, wrong, np.ones(4, np.int64), np.arange(4), "classification")
    assert not re.search(r"-0\.0*(?![\d])", json.dumps(found.to_json()) + comparison_table(found))


def test_one_user_alone_shows_nothing() -> None:
    predicted = {WITH_USER: np.log([[0.9, 0.1]] * 4), POPULATION: np.log([[0.5, 0.5]] * 4)}
    assert compare(WITH_USER, predicted, np.zeros(4, np.int64), np.zeros(4, np.int64), "classification").gains[POPULATION]["nll"].p == 1.0


@pytest.mark.parametrize("users", [5, 12])
def test_few_users_are_found_to_differ_by_chance_no_more_often_than_the_level_says(users: int) -> None:
    means, count = np.random.default_rng(21).normal(size=(4000, users)), np.ones(users, np.int64)
    found = [metrics.p_value(draw, count) for draw in means]
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize("users", [10, 30, 100])
def test_users_with_very_many_rows_dont_make_chance_look_like_more(users: int) -> None:
    draw, found = np.random.default_rng(23), []
    for _ in range(2000):
        rows = np.ceil(draw.lognormal(2, 1.5, users))
        found.append(metrics.p_value(rows * draw.normal(size=users) + np.sqrt(rows) * draw.normal(size=users), rows))
    assert 0.015 < np.mean(np.array(found) < 0.05) < 0.065


def test_two_users_with_the_same_gain_show_little() -> None:
    assert metrics.p_value(np.array([1.0, 1.0]), np.array([1, 1])) == 0.5
    assert metrics.p_value(np.array([0.0, 0.0]), np.array([3, 1])) == 1.0


def test_a_users_mean_cost_keeps_its_sign_where_errors_may_pay() -> None:
    costs = Costs(np.array([[0.0, -2.0], [-2.0, 0.0]]))
    paid = np.log([[0.1, 0.9]] * 3)  # the cheapest answer is 0, and 1 is right
    totals = ComparisonTotals(WITH_USER, "classification", 2, costs=costs)
    totals.add({WITH_USER: paid}, np.ones(3, np.int64), np.arange(3))
    scores = totals.result().predictors[WITH_USER]
    metric = next(name for name in scores.by_user if name not in ("accuracy", "nll"))
    assert scores.by_user[metric] == pytest.approx(scores.intervals[metric].mean) and scores.by_user[metric] < 0


def test_everybodys_habit_weighs_as_much_as_makes_the_users_labels_likeliest() -> None:
    draw = np.random.default_rng(22)
    for strength in (1.0, 20.0):
        habits = draw.dirichlet(strength * np.array([0.3, 0.7]), size=3000)
        counts = np.array([draw.multinomial(12, habit) for habit in habits])
        found = LabelHistory.of_totals("classification", counts.astype(float), np.array([0.3, 0.7]), int(counts.sum()))
        assert found.strength == pytest.approx(strength, rel=0.25)
        means = draw.normal(size=3000) / np.sqrt(1 + strength)  # what users differ by and what their labels do have variance 1 together
        labels = means[:, None] + draw.normal(size=(3000, 12)) * np.sqrt(strength / (1 + strength))
        totals = np.column_stack([labels.sum(axis=1), np.full(3000, 12.0)])
        assert LabelHistory.of_totals("regression", totals, np.zeros(1), labels.size).strength == pytest.approx(strength, rel=0.25)


def test_users_with_one_label_each_dont_tell_how_habits_differ_so_everybodys_counts() -> None:
    history = LabelHistory.of(np.arange(40), np.arange(40) % 2, np.ones(40, np.int64), users=40, outputs=2, task="classification")
    np.testing.assert_allclose(np.exp(history.label_prior(np.array([0]))), [[0.5, 0.5]], atol=1e-3)


def test_the_label_prior_draws_a_users_labels_towards_everybodys() -> None:
    found = LabelHistory.of(np.array([0, 1]), np.array([0, 1]), np.array([6, 2]), users=3, outputs=2, task="classification")
    np.testing.assert_allclose(found.overall, [0.7, 0.3])
    history = replace(found, strength=2.0)
    np.testing.assert_allclose(np.exp(history.label_prior(np.array([0, 1, 2]))), [[7.4 / 8, 0.6 / 8], [1.4 / 4, 2.6 / 4], [0.7, 0.3]])
    np.testing.assert_allclose(np.exp(history.majority(np.array([1]))), [[0.7, 0.3]])


def test_the_label_prior_of_a_regression_is_a_shrunken_mean() -> None:
    found = LabelHistory.of(np.array([0, 1]), np.array([4.0, 1.0]), np.array([3, 1]), users=3, outputs=1, task="regression")
    history = replace(found, strength=2.0)
    np.testing.assert_allclose(history.overall, [13 / 4])
    np.testing.assert_allclose(history.label_prior(np.array([0, 1, 2])), [(12 + 6.5) / 5, (1 + 6.5) / 3, 13 / 4])


def test_a_new_users_label_prior_knows_only_the_given_examples() -> None:
    history = LabelHistory.of(np.array([0, 1]), np.array([0, 1]), np.array([6, 2]), users=2, outputs=2, task="classification")
    narrow = history.restricted_to(np.array([1]), np.array([0]))
    np.testing.assert_allclose(narrow.by_user, [[0, 0], [1, 0]])
    assert narrow.strength == history.strength
    np.testing.assert_allclose(narrow.overall, history.overall)


@pytest.fixture(scope="module")
def costs() -> Costs:
    given = {"a": {"b": 4.0, "c": 1.0}, "b": {"a": 2.0, "c": 0.5, "b": -1.0}, "c": {"a": 7.0, "b": 3.0}}
    return Costs.of(given, LabelSpace("classification", ("a", "b", "c")))


def test_the_decision_is_the_one_that_brute_force_finds_cheapest_and_costs_what_the_matrix_says(costs: Costs) -> None:
    generator = np.random.default_rng(4)
    log_probabilities = np.log(generator.dirichlet(np.ones(3), 200))
    labels, users = generator.integers(0, 3, 200), np.repeat(np.arange(20), 10)
    matrix = [[0.0, 4.0, 1.0], [2.0, -1.0, 0.5], [7.0, 3.0, 0.0]]
    decided, likeliest = [], []
    for row in np.exp(log_probabilities):
        expected = [sum(row[truth] * matrix[truth][answer] for truth in range(3)) for answer in range(3)]
        decided.append(expected.index(min(expected)))
        likeliest.append(row.tolist().index(max(row)))
    assert costs.cheapest(log_probabilities).tolist() == decided and decided != likeliest
    blind = np.tile(np.log([0.2, 0.5, 0.3]), (200, 1))
    found = compare("with_user", {"with_user": log_probabilities, "population": blind}, labels, users, "classification", costs=costs)
    mine, theirs = found.predictors["with_user"], found.predictors["population"]
    for name, answers in (("cost", decided), ("cost_of_likeliest", likeliest)):
        assert mine.figures[name] == pytest.approx(np.mean([matrix[y][a] for y, a in zip(labels, answers, strict=True)]), abs=1e-5)
    assert mine.intervals["cost"].low < mine.figures["cost"] < mine.intervals["cost"].high
    gain = found.gains["population"]["cost"]
    assert gain.mean == pytest.approx(theirs.figures["cost"] - mine.figures["cost"], abs=2e-5)
    assert "cost of the decision" in comparison_table(found) and found.to_json()["predictors"]["with_user"]["cost"] == mine.figures["cost"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"a": {"b": 1.0}}, "no cost of answering 'a' where 'b' is right: add evaluation.cost_matrix.b.a"),
        ({"a": {"d": 1.0}}, "names 'd', which is no class of this generation: a, b"),
    ],
)
def test_a_cost_matrix_of_other_classes_is_one_line_that_says_what_to_change(given: dict[str, dict[str, float]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Costs.of(given, LabelSpace("classification", ("a", "b")))
