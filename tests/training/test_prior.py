"""Where the search for the users' prior begins."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plora_ray.adapters.fit import Linearisation, PosteriorMoments, UserPrior, posterior_moments
from plora_ray.training.prior import LIKELY_VARIANCE, SCALES, SPREAD, VARIANCES, likeliest_start

DIM, LEANINGS = 6, 2
TRAINED = UserPrior(torch.zeros(DIM).double(), torch.eye(DIM).double())


def of_evidence(log_evidence: Callable[[UserPrior], float]) -> Callable[[UserPrior], PosteriorMoments]:
    """Posteriors of nobody, whose labels a prior makes so likely."""
    nobody = torch.zeros(DIM).double(), torch.zeros(DIM, DIM).double()
    return lambda blocks: PosteriorMoments(0, *nobody, 0, 0.0, log_evidence(blocks))


def scale_and_variance(found: UserPrior) -> tuple[float, float]:
    covariance = torch.linalg.inv(found.precision)
    return float(covariance[0, 0]), float(covariance[-1, -1])


@settings(deadline=None, max_examples=50)
@given(st.floats(-3, 3), st.floats(-4, 1), st.floats(-0.9, 0.9), st.floats(0.1, 1000))
def test_the_start_is_the_likeliest_of_all_pairs_of_scale_and_variance(scale: float, variance: float, tied: float, users: float) -> None:
    def log_evidence(blocks: UserPrior) -> float:
        """One hill over both logarithms, by its width and how the two go together any that users' rows may give."""
        found = scale_and_variance(blocks)
        x, y = math.log10(found[0]) - scale, math.log10(found[1]) - variance
        return -users * (x * x + y * y + tied * x * y)

    def surprise(one: float, other: float) -> float:
        unlikely = (math.log(one) ** 2 + math.log(other / LIKELY_VARIANCE) ** 2) / (2 * SPREAD**2)
        return unlikely - log_evidence(TRAINED.in_blocks(one, LEANINGS, other))

    best = min(surprise(one, other) for one in SCALES for other in VARIANCES)
    found = likeliest_start(TRAINED, LEANINGS, of_evidence(log_evidence))
    assert surprise(*scale_and_variance(found)) == pytest.approx(best, rel=1e-6, abs=1e-6)


def test_without_users_the_start_is_the_vectors_spread_and_a_modest_leaning() -> None:
    assert scale_and_variance(likeliest_start(TRAINED, LEANINGS, of_evidence(lambda _: 0.0))) == pytest.approx((1.0, LIKELY_VARIANCE))


def test_a_vector_without_leanings_has_only_a_scale() -> None:
    found = likeliest_start(TRAINED, 0, of_evidence(lambda blocks: -abs(math.log(scale_and_variance(blocks)[0] / 30)) * 100))
    assert torch.allclose(torch.linalg.inv(found.precision), 30 * torch.eye(DIM).double())


def test_users_who_differ_in_their_leanings_only_are_found_to() -> None:
    generator = torch.Generator().manual_seed(5)
    users = torch.arange(100).repeat_interleave(12)
    jacobian = torch.randn(1200, 1, DIM, generator=generator)
    jacobian[:, 0, DIM - 1] = 1.0
    leaning = 1.5 * torch.randn(100, generator=generator)
    labels = (torch.rand(1200, generator=generator) >= torch.sigmoid(leaning[users])).long()  # class 0 is the free one
    linear = Linearisation(torch.zeros(DIM), torch.zeros(1200, 2), jacobian)

    def posterior(blocks: UserPrior) -> PosteriorMoments:
        return posterior_moments(linear, torch.arange(1200), labels, users, 100, blocks, "classification")

    scale, variance = scale_and_variance(likeliest_start(TRAINED, 1, posterior))
    assert variance >= 0.99 and scale < 0.11, "true: 2.25 and 0"


def test_the_start_of_a_regression_finds_the_noise_with_the_spread_of_users() -> None:
    generator = torch.Generator().manual_seed(6)
    users = torch.arange(80).repeat_interleave(10)
    vectors = torch.randn(80, DIM, generator=generator)
    jacobian = 0.2 * torch.randn(800, 1, DIM, generator=generator)
    labels = torch.einsum("rd,rd->r", jacobian[:, 0], vectors[users]) + 0.3 * torch.randn(800, generator=generator)
    linear = Linearisation(torch.zeros(DIM), torch.zeros(800, 1), jacobian)

    def posterior(blocks: UserPrior) -> PosteriorMoments:
        return posterior_moments(linear, torch.arange(800), labels, users, 80, blocks, "regression")

    narrow = UserPrior(TRAINED.mean, TRAINED.precision * 10)
    found = likeliest_start(narrow, 0, posterior)
    assert 0.25 < scale_and_variance(found)[0] < 4, "true: 1, the tenfold of the vectors as trained"
    assert found.noise_variance == pytest.approx(0.09, rel=0.3)
