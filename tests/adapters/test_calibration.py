"""How sure a model may be: the scale is the likeliest one, few rows move it little, and who knows nothing says the classes' frequencies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from plora_ray.adapters.calibration import SCALES, SPREAD, Calibration, best_scale, log_frequencies, scale_losses
from plora_ray.adapters.head import UserTerms
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from tests.adapters.tiny import plm


def drawn(rows: int, classes: int, too_large: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels drawn from softmax(logits / too_large)."""
    numbers = torch.Generator().manual_seed(seed)
    logits = 2 * too_large * torch.randn(rows, classes, generator=numbers)
    return logits, torch.multinomial(torch.softmax(logits / too_large, 1), 1, generator=numbers)[:, 0]


@given(st.integers(1, 400), st.integers(2, 5), st.floats(0.3, 4), st.integers(0, 999))
def test_the_scale_is_the_likeliest_under_a_log_normal_prior_as_an_optimiser_finds_it(
    rows: int, classes: int, too_large: float, seed: int
) -> None:
    logits, labels = drawn(rows, classes, too_large, seed)
    given_logits, truth, base = logits.double().numpy(), labels.numpy(), np.linspace(-2, 0, classes)

    def surprise(log_scale: float) -> float:
        found = base + np.exp(log_scale) * (given_logits - base)
        likelihood = found[np.arange(rows), truth] - np.log(np.exp(found).sum(axis=1))
        return float(-likelihood.sum() + log_scale**2 / (2 * SPREAD**2))

    exact = np.exp(minimize_scalar(surprise, bounds=(-3, 2), method="bounded").x)
    assert best_scale(scale_losses(logits, labels, base.tolist())) == pytest.approx(exact, rel=0.02)


def test_logits_that_are_twice_too_large_are_halved_given_rows_enough() -> None:
    assert best_scale(scale_losses(*drawn(20_000, 3, 2.0, 0), [0.0] * 3)) == pytest.approx(0.5, rel=0.05)


def test_without_rows_logits_stay_as_they_are() -> None:
    assert best_scale(scale_losses(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), [0.0] * 3)) == 1.0
    assert 1.0 in SCALES


def test_a_model_that_knows_nothing_ends_at_the_classes_frequencies() -> None:
    numbers = torch.Generator().manual_seed(0)
    counts = [8000, 1500, 500]
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    base = log_frequencies(counts)
    noise = 3 * torch.randn(10_000, 3, generator=numbers)
    found = Calibration(best_scale(scale_losses(noise, labels, base)), base).of_logits(noise)
    entropy = -sum(count / 10_000 * math.log(count / 10_000) for count in counts)
    assert float(F.cross_entropy(found, labels)) < entropy + 0.01


@pytest.mark.parametrize("terms", ["none", "bias", "taste"])
def test_calibrated_parameters_give_every_user_calibrated_logits(terms: UserTerms) -> None:
    spec = AdapterSpec(model="tiny", task="classification", outputs=3, rank=2, alpha=4.0, user_dim=5, head_terms=terms)
    model = PersonalizedModel(plm("bert"), spec).eval()
    calibration = Calibration(0.3, (-1.0, -0.2, -3.0))
    with torch.no_grad():
        for parameter in model.shared_parameters().values():
            parameter.normal_(std=0.4)
        ids, mask, users = torch.randint(3, 100, (4, 7)), torch.ones(4, 7, dtype=torch.int64), torch.randn(4, 5)
        before = model(ids, mask, users), model(ids, mask)
        model.load_shared(calibration.of_shared(model.shared_parameters()))
        after = model(ids, mask, users), model(ids, mask)
    for small, large in zip(after, before, strict=True):
        torch.testing.assert_close(small, calibration.of_logits(large))
