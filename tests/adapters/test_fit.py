"""The fit of user vectors: the Jacobian, the posterior mode, and that users never influence one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from plora_ray.adapters.fit import Linearisation, UserPrior, linearise, posterior_moments, prior_from_moments, solve_users
from tests.adapters.test_model import trained
from tests.adapters.tiny import batch

DIM = 5


def prior(seed: int = 0) -> UserPrior:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    return UserPrior(torch.randn(DIM, generator=generator, dtype=torch.float64) * 0.3, root @ root.T + torch.eye(DIM))


def random_problem(seed: int, users: int, rows: int, classes: int) -> tuple[Linearisation, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random logits and Jacobians of 9 texts, and rows (text, label, user)."""
    generator = torch.Generator().manual_seed(seed)
    linear = Linearisation(
        torch.randn(DIM, generator=generator) * 0.1,
        torch.randn(9, classes, generator=generator),
        torch.randn(9, classes - 1, DIM, generator=generator),
    )
    texts = torch.randint(9, (rows,), generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    return linear, texts, labels, torch.randint(users, (rows,), generator=generator)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_jacobian_agrees_with_finite_differences(folded: bool, task: str) -> None:
    model = trained("bert", task=task, outputs=3 if task == "classification" else 1).double()
    if folded:
        model = model.fold().double()
    ids, mask = batch()
    point = torch.linspace(-0.5, 0.5, DIM)
    logits, jacobian = linearise(model, ids, mask, point, task)  # type: ignore[arg-type]
    assert jacobian.shape == (5, 2 if task == "classification" else 1, DIM)

    def free(p: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            z = model(ids, mask, p.double().expand(5, -1))
        return z if task == "regression" else z[:, :-1] - z[:, -1:]

    step = 1e-2
    for axis in range(DIM):
        shift = torch.zeros(DIM)
        shift[axis] = step
        numeric = (free(point + shift) - free(point - shift)) / (2 * step)
        assert torch.allclose(jacobian[:, :, axis].double(), numeric.double(), atol=2e-3)
    assert torch.allclose(logits.double(), model(ids, mask, point.double().expand(5, -1)).double(), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 4), rows=st.integers(0, 40))
def test_the_solver_finds_the_minimum_that_scipy_finds(seed: int, classes: int, rows: int) -> None:
    linear, texts, labels, users = random_problem(seed, 3, rows, classes)
    chosen = prior(seed)
    fitted = solve_users(linear, texts, labels, users, 3, chosen, "classification")
    free = (linear.logits[:, :-1] - linear.logits[:, -1:]).double().numpy()
    jacobian, point = linear.jacobian.double().numpy(), linear.point.double().numpy()
    for user in range(3):
        mine = [(int(t), int(y)) for t, y, u in zip(texts, labels, users, strict=True) if u == user]

        def objective(p: np.ndarray, mine: list[tuple[int, int]] = mine) -> float:
            total = 0.5 * (p - chosen.mean.numpy()) @ chosen.precision.numpy() @ (p - chosen.mean.numpy())
            for text, label in mine:
                z = np.append(free[text] + jacobian[text] @ (p - point), 0.0)
                total += np.log(np.exp(z - z.max()).sum()) + z.max() - z[label]
            return float(total)

        best = minimize(objective, np.zeros(DIM), method="BFGS", options={"gtol": 1e-8})
        assert objective(fitted.vectors[user].double().numpy()) <= best.fun + 1e-6
    assert bool(fitted.converged.all())


def test_regression_is_the_closed_form_of_bayesian_linear_regression() -> None:
    generator = torch.Generator().manual_seed(5)
    linear = Linearisation(torch.zeros(DIM), torch.randn(6, 1, generator=generator), torch.randn(6, 1, DIM, generator=generator))
    labels = torch.randn(6, generator=generator)
    chosen = UserPrior(prior().mean, prior().precision, noise_variance=0.4)
    fitted = solve_users(linear, torch.arange(6), labels, torch.zeros(6, dtype=torch.long), 1, chosen, "regression").vectors[0].double()
    x = linear.jacobian[:, 0].double()
    target = labels.double() - linear.logits[:, 0].double()
    exact = torch.linalg.solve(chosen.precision + x.T @ x / 0.4, chosen.precision @ chosen.mean + x.T @ target / 0.4)
    assert torch.allclose(fitted, exact, atol=1e-5)


def test_a_user_fitted_among_thousands_gets_the_vector_it_gets_alone() -> None:
    linear, texts, labels, users = random_problem(7, 3000, 20_000, 3)
    together = solve_users(linear, texts, labels, users, 3000, prior(), "classification").vectors
    for user in (0, 1234, 2999):
        rows = users == user
        alone = solve_users(
            linear, texts[rows], labels[rows], torch.zeros(int(rows.sum()), dtype=torch.long), 1, prior(), "classification"
        ).vectors
        assert torch.allclose(together[user], alone[0], atol=1e-5)


def test_another_users_data_never_changes_a_user() -> None:
    linear, texts, labels, users = random_problem(8, 20, 200, 3)
    before = solve_users(linear, texts, labels, users, 20, prior(), "classification").vectors
    changed = torch.where(users == 3, (labels + 1) % 3, labels)
    after = solve_users(linear, texts, changed, users, 20, prior(), "classification").vectors
    others = torch.arange(20) != 3
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[3], after[3])


def test_a_user_without_rows_gets_the_priors_mean_and_certain_labels_stay_finite() -> None:
    linear, texts, labels, _ = random_problem(9, 1, 30, 2)
    huge = Linearisation(linear.point, linear.logits * 1e3, linear.jacobian * 1e2)
    fitted = solve_users(huge, texts, labels, torch.zeros(30, dtype=torch.long), 2, prior(), "classification").vectors
    assert torch.isfinite(fitted).all()
    assert torch.allclose(fitted[1].double(), prior().mean, atol=1e-6)


def test_the_prior_has_the_vectors_mean_and_for_many_users_their_covariance() -> None:
    generator = torch.Generator().manual_seed(4)
    vectors = (
        torch.randn(50_000, DIM, generator=generator, dtype=torch.float64) @ torch.diag(torch.arange(1.0, DIM + 1, dtype=torch.float64)) + 1
    )
    found = prior_from_moments(len(vectors), vectors.sum(0), vectors.T @ vectors)
    assert torch.allclose(found.mean, vectors.mean(0))
    assert torch.allclose(torch.linalg.inv(found.precision), torch.cov(vectors.T), atol=0.2)
    assert torch.isfinite(prior_from_moments(0, torch.zeros(DIM).double(), torch.zeros(DIM, DIM).double()).precision).all()
    kept = UserPrior.from_tensors(found.tensors())
    assert torch.equal(kept.precision, found.precision) and torch.equal(kept.mean, found.mean)


def test_the_variance_that_is_left_is_the_posteriors_share_of_the_priors_under_laplaces_approximation() -> None:
    linear, texts, labels, users = random_problem(3, 3, 30, 3)
    rows = users != 2  # the last user has none
    chosen = prior(3)
    fitted = solve_users(linear, texts[rows], labels[rows], users[rows], 3, chosen, "classification")
    assert fitted.remaining[2].item() == pytest.approx(1.0, abs=1e-6)

    def objective(p: torch.Tensor) -> torch.Tensor:
        mine = users == 0
        free = (linear.logits[:, :-1] - linear.logits[:, -1:]).double()[texts[mine]]
        z = torch.nn.functional.pad(free + linear.jacobian.double()[texts[mine]] @ (p - linear.point.double()), (0, 1))
        away = p - chosen.mean
        return torch.nn.functional.cross_entropy(z, labels[mine], reduction="sum") + 0.5 * away @ chosen.precision @ away

    hessian = torch.autograd.functional.hessian(objective, fitted.vectors[0].double())
    expected = torch.trace(torch.linalg.inv(hessian) @ chosen.precision) / DIM
    assert fitted.remaining[0].item() == pytest.approx(expected.item(), abs=1e-4) and expected < 0.99


def simulated_users(
    task: str, count: int, rows_each: int, root: torch.Tensor
) -> tuple[Linearisation, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of users whose vectors come from N(1, root root^T), answered as the linearised model says."""
    generator = torch.Generator().manual_seed(11)
    vectors = torch.randn(count, DIM, generator=generator) @ root.T + 1
    rows = count * rows_each
    linear = Linearisation(torch.zeros(DIM), torch.zeros(rows, 1), torch.randn(rows, 1, DIM, generator=generator))
    users = torch.arange(count).repeat_interleave(rows_each)
    scores = torch.einsum("rd,rd->r", linear.jacobian[:, 0], vectors[users])
    if task == "regression":
        return linear, torch.arange(rows), scores + 0.5 * torch.randn(rows, generator=generator), users
    labels = (torch.rand(rows, generator=generator) >= torch.sigmoid(scores)).long()  # class 0 is the free one
    return Linearisation(linear.point, torch.zeros(rows, 2), linear.jacobian), torch.arange(rows), labels, users


def test_each_step_of_empirical_bayes_makes_a_regressions_rows_likelier_under_the_prior() -> None:
    linear, texts, labels, users = simulated_users("regression", 60, 4, torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.1, 0.1])))

    def evidence(chosen: UserPrior) -> float:
        """log p(labels | prior), vectors integrated out in closed form."""
        covariance, total = torch.linalg.inv(chosen.precision), 0.0
        for user in range(60):
            x = linear.jacobian[users == user, 0].double()
            spread = x @ covariance @ x.T + chosen.noise_variance * torch.eye(4, dtype=torch.float64)
            total += multivariate_normal(x @ chosen.mean, spread).logpdf(labels[users == user].double().numpy())
        return total

    chosen, values, claimed = UserPrior(torch.zeros(DIM).double(), torch.eye(DIM).double() * 0.01), [], []
    for _ in range(12):
        moments = posterior_moments(linear, texts, labels, users, 60, chosen, "regression")
        values.append(evidence(chosen))
        claimed.append(moments.log_evidence)
        chosen = moments.prior(chosen, chosen, 0.0)
    assert np.ptp(np.array(values) - np.array(claimed)) < 1e-4, "for a regression the evidence is exact, up to a constant"
    assert all(after > before for before, after in zip(values, values[1:], strict=False))
    assert chosen.noise_variance == pytest.approx(0.25, rel=0.3)
    assert torch.allclose(chosen.mean, torch.ones(DIM).double(), atol=0.6)


def test_empirical_bayes_finds_the_same_spread_of_users_whatever_it_starts_from() -> None:
    root = torch.diag(torch.tensor([1.5, 1.0, 1.0, 0.7, 0.7]))
    linear, texts, labels, users = simulated_users("classification", 200, 20, root)
    found = []
    for width in (0.2, 20.0):
        chosen = UserPrior(torch.zeros(DIM).double(), torch.eye(DIM).double() / width)
        for _ in range(20):
            chosen = posterior_moments(linear, texts, labels, users, 200, chosen, "classification").prior(chosen, chosen, 0.0)
        found.append(float(torch.linalg.inv(chosen.precision).trace()))
    assert found[0] == pytest.approx(found[1], rel=0.25)
    assert 0.25 < found[0] / float((root @ root.T).trace()) < 1.5  # Laplace posteriors of two-class labels are known to fall short


def test_a_start_weighs_as_much_as_so_many_users_covariance() -> None:
    linear, texts, labels, users = simulated_users("classification", 30, 5, torch.eye(DIM))
    moments = posterior_moments(linear, texts, labels, users, 30, prior(), "classification")
    start = UserPrior(torch.zeros(DIM).double(), torch.eye(DIM).double() * 7)
    alone, both = moments.prior(prior(), start, 0.0), moments.prior(prior(), start, 90.0)
    own, mixed = (torch.linalg.inv(found.precision) for found in (alone, both))
    assert torch.allclose(mixed, (30 * own + 90 * torch.eye(DIM).double() / 7) / 120)
    assert torch.equal(both.mean, alone.mean), "where users lie is theirs to say"


def test_a_prior_in_blocks_scales_what_the_vectors_say_and_gives_their_last_numbers_a_variance_of_their_own() -> None:
    whole, covariance = prior(), torch.linalg.inv(prior().precision)
    found = whole.in_blocks(3.0, 2, 0.25)
    expected = torch.zeros(DIM, DIM).double()
    expected[:-2, :-2] = 3 * covariance[:-2, :-2]
    expected[-2:, -2:] = torch.eye(2) * 0.25
    assert torch.allclose(torch.linalg.inv(found.precision), expected) and torch.equal(found.mean, whole.mean)
    assert torch.allclose(torch.linalg.inv(whole.in_blocks(3.0, 0, 0.25).precision), 3 * covariance)


def test_moments_of_groups_of_users_add_up_to_those_of_all() -> None:
    linear, texts, labels, users = simulated_users("regression", 30, 3, torch.eye(DIM))
    whole = posterior_moments(linear, texts, labels, users, 30, prior(), "regression")
    first = users < 10
    parts = [
        posterior_moments(linear, texts[mask], labels[mask], users[mask] - start, count, prior(), "regression")
        for mask, start, count in ((first, 0, 10), (~first, 10, 20))
    ]
    assert torch.allclose(parts[0].outer + parts[1].outer, whole.outer) and torch.allclose(parts[0].total + parts[1].total, whole.total)
    assert parts[0].log_evidence + parts[1].log_evidence == pytest.approx(whole.log_evidence)
    assert parts[0].squared_residuals + parts[1].squared_residuals == pytest.approx(whole.squared_residuals)
