"""Fitting users' vectors with everything shared frozen: linearise once, then solve every user exactly.

A user vector p_u enters every layer linearly and is small, so logits are close to linear in it near the prior's mean:

    z(p) ~ z(p0) + J (p - p0)        J [outputs, d], one Jacobian a text

and the posterior mode of one user under the prior N(mu, C) is a strictly convex problem in d unknowns:

    min_p  sum_rows loss(z0 + J (p - p0), label) + 1/2 (p - mu)^T C^-1 (p - mu)

solved for all users at once by Newton's method with batched Cholesky factors. No learning rate; few examples shrink to
the prior. Linearising everybody at the same p0 makes z0 and J depend on the text alone, so users share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from plora_ray.adapters.model import Task

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

NEWTON_STEPS = 25
TOLERANCE = 1e-6
LEAST_NOISE = 1e-4  # of a standardised regression label: below it one row would outweigh any prior
GROUP_ROWS = 4096  # rows that are worked on at once: a Jacobian of 2 MB an output at d = 64


@dataclass(frozen=True)
class UserPrior:
    """Gaussian prior of user vectors. mean: [d]; precision: [d, d], the inverse covariance; both float64.

    noise_variance: variance of a regression label around its prediction; unused for classification.
    """

    mean: Tensor
    precision: Tensor
    noise_variance: float = 1.0

    def scaled(self, factor: float) -> UserPrior:
        """The same prior with its covariance multiplied by `factor`."""
        return UserPrior(self.mean, self.precision / factor, self.noise_variance)

    def tensors(self) -> dict[str, Tensor]:
        """The prior as named tensors, to be kept beside the shared parameters."""
        noise = torch.tensor([self.noise_variance], dtype=torch.float64)
        return {"prior.mean": self.mean.contiguous(), "prior.precision": self.precision.contiguous(), "prior.noise_variance": noise}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> UserPrior:
        """The prior that `tensors` were made from; other names are ignored. Raises KeyError if one is missing."""
        return cls(tensors["prior.mean"], tensors["prior.precision"], float(tensors["prior.noise_variance"]))


def prior_from_moments(users: int, total: Tensor, outer: Tensor, *, shrinkage_users: float = 64.0, floor: float = 1e-3) -> UserPrior:
    """Prior from trained user vectors, given their number, sum [d] and sum of outer products [d, d], float64.

    The covariance is shrunk to a multiple of the identity, whose weight is shrinkage_users / (users + shrinkage_users);
    `floor` bounds the variances from below.
    """
    dim = len(total)
    mean = total / max(users, 1)
    covariance = outer / max(users, 1) - torch.outer(mean, mean)
    identity = torch.eye(dim, dtype=torch.float64)
    weight = shrinkage_users / (users + shrinkage_users)
    blended = (1 - weight) * covariance + (weight * covariance.diagonal().mean() + floor) * identity
    return UserPrior(mean, torch.linalg.inv(blended))


@dataclass(frozen=True)
class Linearisation:
    """Logits of texts near one user vector, float32.

    point: [d], the p0 of all rows. logits: [texts, outputs] there. jacobian: [texts, free, d] of the free outputs: for a
    classification the logits minus the last one (softmax sees only differences), so free = outputs - 1; else 1.
    """

    point: Tensor
    logits: Tensor
    jacobian: Tensor


def _free(logits: Tensor, task: Task) -> Tensor:
    return logits if task == "regression" else logits[:, :-1] - logits[:, -1:]


def linearise(forward: Forward, input_ids: Tensor, attention_mask: Tensor, point: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Logits [batch, outputs] and Jacobian [batch, free, d] of one batch at `point` [d]; one backward pass a free output.

    Rows don't mix inside the model, so the gradient of a column's sum is every row's own gradient.
    """
    with torch.enable_grad():
        vectors = point.float().to(input_ids.device).expand(input_ids.shape[0], -1).clone().requires_grad_(True)
        logits = forward(input_ids, attention_mask, vectors)
        free = _free(logits, task)
        columns = [
            torch.autograd.grad(free[:, column].sum(), vectors, retain_graph=column + 1 < free.shape[1])[0]
            for column in range(free.shape[1])
        ]
    return logits.detach(), torch.stack(columns, dim=1).detach()


@dataclass(frozen=True)
class FittedUsers:
    """What a solver found.

    vectors: [users, width] float32. converged: [users] bool, whether the solver ended before its last step allowed.
    remaining: [users] float32 in (0, 1], the share of the prior's variance that a user's rows leave, trace(H^-1 C^-1) / d with
        H the Hessian at the mode (Laplace's approximation); NaN where a solver gives none.
    """

    vectors: Tensor
    converged: Tensor
    remaining: Tensor


def solve_users(
    linear: Linearisation, texts: Tensor, labels: Tensor, users: Tensor, count: int, prior: UserPrior, task: Task
) -> FittedUsers:
    """Posterior modes of `count` users at once.

    texts: [rows] row of `linear` each example uses; labels: [rows] class index or value; users: [rows] in 0..count-1.
    Users are independent: a user's result is what it is with no other user present, up to rounding. A user without rows
    gets the prior's mean.
    """
    problem = _Problem(linear, texts, labels, users, count, prior, task)
    p = prior.mean.expand(count, -1).clone()
    objective = problem.objective(p)
    converged = torch.zeros(count, dtype=torch.bool)
    for _ in range(NEWTON_STEPS):
        gradient, hessian = problem.derivatives(p)
        factor = torch.linalg.cholesky(hessian)
        direction = -torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
        decrement = -(gradient * direction).sum(-1)
        converged = decrement < TOLERANCE
        if bool(converged.all()):
            break
        direction[converged] = 0.0
        p, objective = problem.line_search(p, objective, direction, decrement)
    else:
        factor = torch.linalg.cholesky(problem.derivatives(p)[1])
    left = torch.cholesky_solve(prior.precision.expand(count, -1, -1), factor).diagonal(dim1=1, dim2=2).mean(1)
    return FittedUsers(p.float(), converged, left.float())


@dataclass(frozen=True)
class PosteriorMoments:
    """Sums over users of what their posteriors N(p, H^-1) say; float64, and additive over groups of users.

    total: [d] of modes p. outer: [d, d] of p p^T + H^-1. squared_residuals: of a regression's rows, expected under the posterior.
    log_evidence: how likely the prior makes the users' labels, Laplace's approximation (MacKay 1992), up to a constant.
    """

    users: int
    total: Tensor
    outer: Tensor
    rows: int
    squared_residuals: float
    log_evidence: float

    def prior(self, before: UserPrior) -> UserPrior:
        """The Gaussian that fits these users best: one maximisation step after `before`, which stays if there are no users."""
        if self.users == 0:
            return before
        mean = self.total / self.users
        covariance = self.outer / self.users - torch.outer(mean, mean)
        noise = max(self.squared_residuals / self.rows, LEAST_NOISE) if self.squared_residuals > 0 else before.noise_variance
        return UserPrior(mean, torch.linalg.inv(covariance), noise)


def posterior_moments(
    linear: Linearisation, texts: Tensor, labels: Tensor, users: Tensor, count: int, prior: UserPrior, task: Task
) -> PosteriorMoments:
    """The expectation step of empirical Bayes with Laplace posteriors; arguments as in `solve_users`."""
    problem = _Problem(linear, texts, labels, users, count, prior, task)
    modes = solve_users(linear, texts, labels, users, count, prior, task).vectors.double()
    hessian = problem.derivatives(modes)[1]
    covariance = torch.linalg.inv(hessian)
    squared, noise = 0.0, 0.0
    if task == "regression":
        squared, noise = problem.squared_residuals(modes, covariance), 0.5 * len(texts) * math.log(prior.noise_variance)
    determinants = 0.5 * (count * torch.logdet(prior.precision) - torch.logdet(hessian).sum())
    evidence = float(determinants - problem.objective(modes).sum()) - noise
    return PosteriorMoments(count, modes.sum(0), modes.T @ modes + covariance.sum(0), len(texts), squared, evidence)


@dataclass(frozen=True)
class _Group:
    """Users of like row counts, filled up to equally many. users: [u]; rows: [u, n]; weights: [u, n], 0 where filled up."""

    users: Tensor
    rows: Tensor
    weights: Tensor


def _groups(users: Tensor, count: int) -> list[_Group]:
    """All rows by user, at most GROUP_ROWS together; a user with more is in several groups."""
    order = torch.argsort(users, stable=True)
    counts = torch.bincount(users, minlength=count)
    starts = counts.cumsum(0) - counts
    groups = []
    by_count = torch.argsort(counts, descending=True, stable=True)
    place = 0
    while place < count and (most := int(counts[by_count[place]])):
        chosen = by_count[place : place + max(1, GROUP_ROWS // most)]
        place += len(chosen)
        for first in range(0, most, GROUP_ROWS):
            offsets = torch.arange(first, min(most, first + GROUP_ROWS))
            real = offsets < counts[chosen].unsqueeze(1)
            rows = order[torch.where(real, starts[chosen].unsqueeze(1) + offsets, 0)]
            groups.append(_Group(chosen, rows, real.double()))
    return groups


class _Problem:
    """The convex objective of every user of a wave, its gradient and Hessian; float64 where users' sums are formed.

    Users of like row counts are one batched product, so that a Hessian is J^T W J and no row's outer product is ever formed.
    """

    def __init__(
        self, linear: Linearisation, texts: Tensor, labels: Tensor, users: Tensor, count: int, prior: UserPrior, task: Task
    ) -> None:
        self.task, self.prior, self.count = task, prior, count
        self.texts, self.labels = texts, labels
        self.jacobian = linear.jacobian
        self.point = linear.point.double()
        self.free = _free(linear.logits, task).double()
        self.groups = _groups(users, count)

    def _at(self, p: Tensor, group: _Group) -> tuple[Tensor, Tensor]:
        """Jacobian [u, n x free, d] and free logits [u, n, free] of a group's rows at their users' vectors."""
        texts = self.texts[group.rows]
        jacobian = self.jacobian[texts].double().flatten(1, 2)
        shift = (p - self.point)[group.users]
        return jacobian, self.free[texts] + torch.bmm(jacobian, shift.unsqueeze(-1)).view(*texts.shape, -1)

    def objective(self, p: Tensor) -> Tensor:
        """[users]: negative log posterior of each user, up to a constant."""
        centred = p - self.prior.mean
        total = 0.5 * ((centred @ self.prior.precision) * centred).sum(1)
        for group in self.groups:
            _, free = self._at(p, group)
            labels = self.labels[group.rows]
            if self.task == "regression":
                losses = 0.5 * (free[..., 0] - labels.double()).square() / self.prior.noise_variance
            else:
                losses = F.cross_entropy(F.pad(free, (0, 1)).flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
            total.index_add_(0, group.users, (losses * group.weights).sum(1))
        return total

    def derivatives(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient [users, d] and Hessian [users, d, d] of `objective`."""
        gradient = (p - self.prior.mean) @ self.prior.precision
        hessian = self.prior.precision.expand(self.count, -1, -1).clone()
        for group in self.groups:
            jacobian, free = self._at(p, group)
            labels, weights = self.labels[group.rows], group.weights.unsqueeze(-1)
            if self.task == "regression":
                residual = (free - labels.double().unsqueeze(-1)) / self.prior.noise_variance * weights
                curvature = weights / self.prior.noise_variance
            else:
                curvature = F.softmax(F.pad(free, (0, 1)), dim=-1)[..., :-1] * weights
                residual = curvature - F.one_hot(labels, free.shape[-1] + 1)[..., :-1] * weights
            gradient.index_add_(0, group.users, torch.bmm(residual.flatten(1).unsqueeze(1), jacobian).squeeze(1))
            curved = torch.bmm(jacobian.mT, jacobian * curvature.flatten(1).unsqueeze(-1))
            if self.task == "classification":  # softmax couples the outputs: J^T (diag(q) - q q^T) J
                mean = torch.einsum("unf,unfd->und", curvature, jacobian.view(*free.shape, -1))
                curved -= torch.bmm(mean.mT, mean)
            hessian.index_add_(0, group.users, curved)
        return gradient, hessian

    def squared_residuals(self, p: Tensor, covariance: Tensor) -> float:
        """Sum over a regression's rows of the squared residual, expected for vectors N(p, covariance [users, d, d])."""
        total = 0.0
        for group in self.groups:
            jacobian, free = self._at(p, group)
            spread = (torch.bmm(jacobian, covariance[group.users]) * jacobian).sum(-1)
            squared = (free[..., 0] - self.labels[group.rows].double()).square()
            total += float(((squared + spread) * group.weights).sum())
        return total

    def line_search(self, p: Tensor, objective: Tensor, direction: Tensor, decrement: Tensor) -> tuple[Tensor, Tensor]:
        """Halve each user's step until its objective falls enough (Armijo, 1e-4); a user that can't improve stays."""
        size = torch.ones(self.count, 1, dtype=p.dtype)
        best, best_objective = p.clone(), objective.clone()
        pending = direction.abs().sum(-1) > 0
        for _ in range(20):
            trial = p + size * direction
            value = self.objective(trial)
            accepted = pending & (value <= objective - 1e-4 * size.squeeze(-1) * decrement)
            best[accepted], best_objective[accepted] = trial[accepted], value[accepted]
            pending &= ~accepted
            if not bool(pending.any()):
                break
            size[pending] *= 0.5
        return best, best_objective
