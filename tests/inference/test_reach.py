"""How far an adapter lies from the population, and the bound on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from plora_ray.adapters.fit import UserPrior
from plora_ray.inference import LoadedGeneration, load_generation
from plora_ray.inference.reach import distances, within
from plora_ray.store import AdapterStore
from tests.generations import DIM, publish


@pytest.fixture
def loaded(tiny_plm: str, tmp_path: Path) -> LoadedGeneration:
    """A generation whose prior has a mean and correlations."""
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g1", ["ann"])
    root = np.random.default_rng(1).normal(size=(DIM, DIM))
    prior = UserPrior(torch.arange(DIM).double() / DIM, torch.from_numpy(root @ root.T + np.eye(DIM)))
    return replace(load_generation(store), prior=prior)


def test_users_as_the_prior_expects_them_lie_around_one_whatever_its_shape(loaded: LoadedGeneration) -> None:
    assert loaded.prior is not None
    mean, covariance = loaded.prior.mean.numpy(), np.linalg.inv(loaded.prior.precision.numpy())
    drawn = np.random.default_rng(2).multivariate_normal(mean, covariance, size=4000)
    squared = distances(loaded, torch.from_numpy(drawn)).square().numpy()
    assert abs(squared.mean() - 1) < 4 * (2 / DIM / 4000) ** 0.5  # a mean of chi-squared variables over their degrees of freedom


def test_what_lies_beyond_is_scaled_back_towards_the_population_and_nothing_else_moves(loaded: LoadedGeneration) -> None:
    assert loaded.prior is not None
    mean = loaded.prior.mean
    vectors = (mean + torch.from_numpy(np.random.default_rng(3).normal(size=(4, DIM)))).float()
    far = distances(loaded, vectors)
    bound = float(far.sort().values[1:3].mean())  # two lie within, two beyond
    bounded = within(loaded, vectors, mean.float().expand(4, -1), bound)
    inside = far <= bound
    assert torch.equal(bounded[inside], vectors[inside]) and inside.sum() == 2
    assert torch.allclose(distances(loaded, bounded)[~inside], torch.tensor(bound, dtype=torch.float64), rtol=1e-6)
    directions = [torch.nn.functional.normalize(x.double() - mean, dim=1)[~inside] for x in (vectors, bounded)]
    assert torch.allclose(*directions, atol=1e-6)


def test_who_was_trained_further_out_may_stay_as_far_out_and_go_no_further(loaded: LoadedGeneration) -> None:
    assert loaded.prior is not None
    start = (loaded.prior.mean + 2).float().unsqueeze(0)
    further = (loaded.prior.mean + 5).float().unsqueeze(0)
    assert torch.equal(within(loaded, start, start, 0.1), start)
    assert torch.allclose(within(loaded, further, start, 0.1), start, rtol=1e-5)
