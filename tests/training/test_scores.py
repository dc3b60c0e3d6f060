"""The training report's figures, added up wave by wave, are those of all rows at once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss, mean_squared_error, r2_score

from plora_ray.adapters.labels import LabelSpace
from plora_ray.data.stats import PartitionStats
from plora_ray.evaluation.metrics import log_softmax, paired, row_nll
from plora_ray.store import ObjectStore
from plora_ray.training.run_state import RunState, WaveOutcome
from plora_ray.training.scores import WaveTotals

CLASSES = LabelSpace("classification", ("a", "b", "c"))
VALUES = LabelSpace("regression", mean=50.0, std=4.0)


def stats(counts: np.ndarray) -> PartitionStats:
    train = {name: int(count) for name, count in zip(CLASSES.classes, counts, strict=True)}
    return PartitionStats(digest="", partitions=[], label_counts={"train": train, "validation": {}, "test": {}}, skipped={})


def outcome(generator: np.random.Generator, users: int, rows: int, outputs: int) -> WaveOutcome:
    """`rows` test rows of at most `users` users; some users have none."""
    regression = outputs == 1
    labels = generator.normal(size=rows).astype(np.float32) if regression else generator.integers(0, outputs, rows)
    personal, population = generator.normal(size=(2, rows, outputs)).astype(np.float32)
    personal[np.arange(rows), 0 if regression else labels] += 1.0
    counts = generator.normal(size=(users, 1)) if regression else generator.integers(0, 9, (users, outputs))
    examples = generator.integers(1, 40, users) if regression else np.maximum(counts.sum(axis=1), 1)
    return WaveOutcome(
        examples=examples.astype(np.int32), row_users=np.sort(generator.integers(0, users, rows)), labels=labels,
        population=population, personal=personal, label_counts=counts.astype(np.float32),
        remaining=np.where(generator.random(users) < 0.3, np.nan, generator.random(users)).astype(np.float32),
        guarded=np.arange(users) % 5 == 0,
        copied=np.zeros(0, np.int32),
    )  # fmt: skip


def merged(waves: list[WaveOutcome], name: str) -> np.ndarray:
    return np.concatenate([getattr(wave, name) for wave in waves])


def numbered(waves: list[WaveOutcome]) -> np.ndarray:
    """The user of every row, numbered through all waves."""
    starts = np.cumsum([0, *(len(wave.examples) for wave in waves)])
    return np.concatenate([wave.row_users + start for wave, start in zip(waves, starts[:-1], strict=True)])


def without_p(gain: dict[str, float]) -> dict[str, float]:
    """The gain's mean and interval; its p-value, which must be one, is tested with the metrics."""
    assert 0 <= gain["p"] <= 1
    return {name: value for name, value in gain.items() if name != "p"}


def test_classification_figures_of_single_waves_are_those_of_all_rows_together() -> None:
    generator = np.random.default_rng(0)
    waves = [outcome(generator, 30, rows, 3) for rows in (120, 0, 70, 1)]
    counts = merged(waves, "label_counts")
    totals = WaveTotals(CLASSES, stats(counts.sum(axis=0)))
    for wave in waves:
        totals.add(wave)
    comparison = totals.comparison()
    assert comparison is not None
    found, labels, users = totals.to_json(comparison), merged(waves, "labels"), numbered(waves)
    personal, population = (log_softmax(merged(waves, name).astype(np.float64)) for name in ("personal", "population"))
    smoothed = counts + 2 * counts.sum(axis=0) / counts.sum()
    prior = (smoothed / smoothed.sum(axis=1, keepdims=True))[users]
    expected = {"with_user": np.exp(personal), "without_user": np.exp(population), "user_label_prior": prior}
    for name, probabilities in expected.items():
        assert found[name]["rows"] == len(labels)
        assert found[name]["accuracy"] == pytest.approx(accuracy_score(labels, probabilities.argmax(axis=1)), abs=1e-5), name
        assert found[name]["macro_f1"] == pytest.approx(f1_score(labels, probabilities.argmax(axis=1), average="macro"), abs=1e-5), name
        assert found[name]["nll"] == pytest.approx(log_loss(labels, probabilities), abs=1e-5), name
    assert without_p(found["nll_gain"]) == pytest.approx(paired(row_nll(personal, labels), row_nll(population, labels), users), abs=1e-5)
    right = [(scores.argmax(axis=1) == labels).astype(float) for scores in (personal, population)]
    assert without_p(found["accuracy_gain"]) == pytest.approx(paired(-right[0], -right[1], users), abs=1e-5)


def test_regression_figures_of_single_waves_are_those_of_all_rows_together_in_the_labels_units() -> None:
    generator = np.random.default_rng(1)
    waves = [outcome(generator, 30, rows, 1) for rows in (50, 90)]
    totals = WaveTotals(VALUES, stats(np.zeros(3)))
    for wave in waves:
        totals.add(wave)
    comparison = totals.comparison()
    assert comparison is not None
    found, users = totals.to_json(comparison), numbered(waves)
    labels, personal, population = (
        50 + 4 * merged(waves, name).reshape(len(users), -1)[:, 0] for name in ("labels", "personal", "population")
    )
    assert found["with_user"]["mse"] == pytest.approx(mean_squared_error(labels, personal), rel=1e-4)
    assert found["without_user"]["r2"] == pytest.approx(r2_score(labels, population), rel=1e-4)
    gain = paired((personal - labels) ** 2, (population - labels) ** 2, users)
    assert without_p(found["squared_error_gain"]) == pytest.approx(gain, rel=1e-4)
    own = 50 + 4 * (merged(waves, "label_counts")[:, 0] / (merged(waves, "examples") + 2))
    assert found["user_label_prior"]["mse"] == pytest.approx(mean_squared_error(labels, own[users]), rel=1e-4)


def test_users_are_grouped_by_their_training_rows_in_powers_of_two() -> None:
    waves = [outcome(np.random.default_rng(seed), 40, 200, 3) for seed in (2, 3)]
    totals = WaveTotals(CLASSES, stats(np.ones(3)))
    for wave in waves:
        totals.add(wave)
    users, examples, labels = numbered(waves), merged(waves, "examples"), merged(waves, "labels")
    gain = row_nll(log_softmax(merged(waves, "population")), labels) - row_nll(log_softmax(merged(waves, "personal")), labels)
    buckets = totals.gain_by_training_rows()
    assert sum(bucket.users for bucket in buckets) == len(np.unique(users))
    for bucket in buckets:
        rows = (examples[users] >= bucket.first) & (examples[users] <= bucket.last)
        assert bucket.last == 2 * bucket.first - 1 and bucket.users == len(np.unique(users[rows]))
        assert bucket.gains["nll"].mean == pytest.approx(gain[rows].mean(), abs=1e-5)


def test_memory_does_not_grow_with_test_rows() -> None:
    objects = ObjectStore("memory://scores-memory")
    held, peaks = {}, {}
    for rows in (1_000, 30_000):
        run = RunState(objects, f"run{rows}")
        for wave in range(12):
            run.save_wave(wave, outcome(np.random.default_rng(wave), 50, rows, 3), None)
        totals = WaveTotals(CLASSES, stats(np.ones(3)))
        tracemalloc.start()
        for _, found in run.load_waves(dict.fromkeys(range(12))):
            totals.add(found)
        del found
        held[rows], peaks[rows] = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert totals.users == 600 and totals.guarded == 120, "every fifth"
    assert held[30_000] < 2 * held[1_000], "rows are kept after their wave was counted"
    whole = 12 * 30_000 * (2 * 3 * 4 + 2 * 8)  # bytes of all waves' logits, labels and users
    assert peaks[30_000] < whole, "all waves' rows were held at once"


def test_the_share_of_variance_left_counts_the_users_whose_solver_tells_one() -> None:
    generator = np.random.default_rng(3)
    waves = [outcome(generator, 30, 40, 3) for _ in range(3)]
    totals = WaveTotals(CLASSES, stats(merged(waves, "label_counts").sum(axis=0)))
    for wave in waves:
        totals.add(wave)
    left = merged(waves, "remaining")
    assert totals.remaining == pytest.approx(np.nanmean(left), abs=1e-6)
    assert totals.remaining_users.sum() == np.isfinite(left).sum() < len(left)
