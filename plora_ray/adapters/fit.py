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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plora_ray.adapters.forgetting import Forgetting
from plora_ray.adapters.leave_one_out import harmed
from plora_ray.adapters.model import Task
from plora_ray.adapters.problem import FitProblem, free_logits

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

NEWTON_STEPS = 25
TOLERANCE = 1e-6
LEAST_NOISE = 1e-4  # of a standardised regression label: below it one row would outweigh any prior


@dataclass(frozen=True)
class UserPrior:
    """Gaussian prior of user vectors. mean: [d]; precision: [d, d], the inverse covariance; both float64.

    noise_variance: variance of a regression label around its prediction; unused for classification. lasting: share, at most 1,
    of a fitted user's way from the mean that a fit keeps, where all rows count the same (`lasting.py`). forgetting: how dated rows are
    to be counted instead; None: so as well.
    """

    mean: Tensor
    precision: Tensor
    noise_variance: float = 1.0
    lasting: float = 1.0
    forgetting: Forgetting | None = None

    def in_blocks(self, scale: float, leanings: int, variance: float) -> UserPrior:
        """The same prior with its covariance multiplied by `scale`, but for the last `leanings` numbers.

        Of those each has `variance`, and none goes with another.
        """
        first = len(self.mean) - leanings
        covariance = torch.linalg.inv(self.precision)[:first, :first]
        precision = torch.eye(len(self.mean), dtype=torch.float64) / variance
        precision[:first, :first] = torch.linalg.inv(covariance) / scale
        return replace(self, precision=precision)

    def of_dated_rows(self) -> UserPrior:
        """The prior for rows that count by their age: the same but for what lasts."""
        return self if self.forgetting is None else replace(self, lasting=self.forgetting.lasting)

    def centred(self) -> UserPrior:
        """The same prior of vectors that are counted from its mean."""
        return replace(self, mean=torch.zeros_like(self.mean))

    def tensors(self) -> dict[str, Tensor]:
        """The prior as named tensors, to be kept beside the shared parameters."""
        named = {"prior.mean": self.mean.contiguous(), "prior.precision": self.precision.contiguous()}
        numbers = {"prior.noise_variance": self.noise_variance, "prior.lasting": self.lasting}
        named |= {name: torch.tensor([number], dtype=torch.float64) for name, number in numbers.items()}
        return named | (self.forgetting.tensors() if self.forgetting is not None else {})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> UserPrior:
        """The prior that `tensors` were made from; other names are ignored. Raises KeyError if one is missing.

        One from before there was a `lasting` is read as if all lasted.
        """
        lasting = float(tensors["prior.lasting"]) if "prior.lasting" in tensors else 1.0
        noise_variance, forgetting = float(tensors["prior.noise_variance"]), Forgetting.from_tensors(tensors)
        return cls(tensors["prior.mean"], tensors["prior.precision"], noise_variance, lasting, forgetting)


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


def linearise(forward: Forward, input_ids: Tensor, attention_mask: Tensor, point: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Logits [batch, outputs] and Jacobian [batch, free, d] of one batch at `point` [d]; one backward pass a free output.

    Rows don't mix inside the model, so the gradient of a column's sum is every row's own gradient.
    """
    with torch.enable_grad():
        vectors = point.float().to(input_ids.device).expand(input_ids.shape[0], -1).clone().requires_grad_(True)
        logits = forward(input_ids, attention_mask, vectors)
        free = free_logits(logits, task)
        columns = [
            torch.autograd.grad(free[:, column].sum(), vectors, retain_graph=column + 1 < free.shape[1])[0]
            for column in range(free.shape[1])
        ]
    return logits.detach(), torch.stack(columns, dim=1).detach()


@dataclass(frozen=True)
class FittedUsers:
    """What a solver found.

    vectors: [users, width] float32, as they are kept. converged: [users] bool, whether the solver ended before its last step allowed.
    remaining: [users] float32 in (0, 1], the share of the prior's variance that a user's rows leave, trace(H^-1 C^-1) / d with
        H the Hessian at the mode (Laplace's approximation); NaN where a solver gives none.
    guarded: [users] bool, whose own rows say that the fit harms them: their vectors are the fallback.
    """

    vectors: Tensor
    converged: Tensor
    remaining: Tensor
    guarded: Tensor


def solve_users(
    linear: Linearisation, texts: Tensor, labels: Tensor, users: Tensor, count: int, prior: UserPrior, task: Task,
    fallback: Tensor | None = None, weights: Tensor | None = None,
) -> FittedUsers:  # fmt: skip
    """Posterior modes of `count` users at once, drawn to the prior's mean as far as they won't last (`UserPrior.lasting`).

    texts: [rows] row of `linear` each example uses; labels: [rows] class index or value; users: [rows] in 0..count-1.
    Users are independent: a user's result is what it is with no other user present, up to rounding. A user without rows
    gets the prior's mean. fallback: [d] or [users, d], what those get whom the mode harms (`leave_one_out.harmed`); None: nobody is asked.
    weights: [rows] float64, what each row's loss counts (`Forgetting.weights`); None: 1.
    """
    problem = FitProblem(linear, texts, labels, users, count, prior, task, weights)
    p = prior.mean.expand(count, -1).clone()
    objective = problem.objective(p)
    converged = torch.zeros(count, dtype=torch.bool)
    for step in range(NEWTON_STEPS):
        gradient, hessian = problem.derivatives(p)
        factor = torch.linalg.cholesky(hessian)
        direction = -torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
        decrement = -(gradient * direction).sum(-1)
        converged = (decrement < TOLERANCE) & (step > 0)  # who has rows leaves the prior's mean, however little
        if bool(converged.all()):
            break
        direction[converged] = 0.0
        p, objective = problem.line_search(p, objective, direction, decrement)
    else:
        factor = torch.linalg.cholesky(problem.derivatives(p)[1])
    left = torch.cholesky_solve(prior.precision.expand(count, -1, -1), factor).diagonal(dim1=1, dim2=2).mean(1)
    guarded = torch.zeros(count, dtype=torch.bool) if fallback is None else harmed(problem, p, factor, fallback.double())
    p = torch.lerp(prior.mean.expand_as(p), p, prior.lasting)
    if fallback is not None:
        p = torch.where(guarded.unsqueeze(1), fallback.double(), p)
    return FittedUsers(p.float(), converged, left.float(), guarded)


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

    def prior(self, before: UserPrior, start: UserPrior, start_users: float) -> UserPrior:
        """The Gaussian that fits these users best: one maximisation step after `before`, which stays if there are no users.

        start: its covariance weighs as much as that of `start_users` more users (the mode under an inverse Wishart prior), so that a few
        users don't decide on all directions of many.
        """
        if self.users == 0:
            return before
        mean = self.total / self.users
        covariance = self.outer / self.users - torch.outer(mean, mean)
        weight = start_users / (self.users + start_users)
        covariance = (1 - weight) * covariance + weight * torch.linalg.inv(start.precision)
        return UserPrior(mean, torch.linalg.inv(covariance), self.noise_variance(before))

    def noise_variance(self, before: UserPrior) -> float:
        """Of a regression's rows around what the posteriors say; that of `before` for a classification and without rows."""
        return max(self.squared_residuals / self.rows, LEAST_NOISE) if self.squared_residuals > 0 else before.noise_variance


def posterior_moments(
    linear: Linearisation, texts: Tensor, labels: Tensor, users: Tensor, count: int, prior: UserPrior, task: Task
) -> PosteriorMoments:
    """The expectation step of empirical Bayes with Laplace posteriors; arguments as in `solve_users`."""
    problem = FitProblem(linear, texts, labels, users, count, prior, task)
    modes = solve_users(linear, texts, labels, users, count, replace(prior, lasting=1.0), task).vectors.double()
    hessian = problem.derivatives(modes)[1]
    covariance = torch.linalg.inv(hessian)
    squared, noise = 0.0, 0.0
    if task == "regression":
        squared, noise = problem.squared_residuals(modes, covariance), 0.5 * len(texts) * math.log(prior.noise_variance)
    determinants = 0.5 * (count * torch.logdet(prior.precision) - torch.logdet(hessian).sum())
    evidence = float(determinants - problem.objective(modes).sum()) - noise
    return PosteriorMoments(count, modes.sum(0), modes.T @ modes + covariance.sum(0), len(texts), squared, evidence)
