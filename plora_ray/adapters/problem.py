"""The convex problem that every user's fit is, for many users at once: objective, gradient, Hessian. Knows no solver.

Users of like row counts are one batched product, so that a Hessian is J^T W J and no row's outer product is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from plora_ray.adapters.model import Task

if TYPE_CHECKING:
    from plora_ray.adapters.fit import Linearisation, UserPrior

GROUP_ROWS = 4096  # rows that are worked on at once: a Jacobian of 2 MB an output at d = 64


def free_logits(logits: Tensor, task: Task) -> Tensor:
    """[..., free] of logits [..., outputs]: softmax sees only differences, so a classification's are those to the last one."""
    return logits if task == "regression" else logits[..., :-1] - logits[..., -1:]


@dataclass(frozen=True)
class Group:
    """Users of like row counts, filled up to equally many. users: [u]; rows: [u, n]; weights: [u, n] of rows, 0 where filled up."""

    users: Tensor
    rows: Tensor
    weights: Tensor


def _groups(users: Tensor, count: int, weights: Tensor | None) -> list[Group]:
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
            groups.append(Group(chosen, rows, real.double() if weights is None else real * weights[rows]))
    return groups


class FitProblem:
    """The objective of `count` users; float64 where users' sums are formed. Arguments as those of `solve_users`.

    free: [texts, free] logits at the linearisation's point.
    """

    def __init__(
        self, linear: Linearisation, texts: Tensor, labels: Tensor, users: Tensor, count: int, prior: UserPrior, task: Task,
        weights: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.task, self.prior, self.count = task, prior, count
        self.texts, self.labels = texts, labels
        self.jacobian = linear.jacobian
        self.point = linear.point.double()
        self.free = free_logits(linear.logits, task).double()
        self.groups = _groups(users, count, weights)

    def at(self, p: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        """Jacobian [u, n x free, d] and free logits [u, n, free] of a group's rows at their users' vectors."""
        texts = self.texts[group.rows]
        jacobian = self.jacobian[texts].double().flatten(1, 2)
        shift = (p - self.point)[group.users]
        return jacobian, self.free[texts] + torch.bmm(jacobian, shift.unsqueeze(-1)).view(*texts.shape, -1)

    def losses(self, free: Tensor, labels: Tensor) -> Tensor:
        """[u, n] of rows with logits [u, n, free] and labels [u, n]."""
        if self.task == "regression":
            return 0.5 * (free[..., 0] - labels.double()).square() / self.prior.noise_variance
        return F.cross_entropy(F.pad(free, (0, 1)).flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    def slopes(self, free: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of `losses` in the logits, [u, n, free], and what curves it: probabilities of a classification, else 1 / noise."""
        if self.task == "regression":
            return (free - labels.double().unsqueeze(-1)) / self.prior.noise_variance, torch.full_like(free, 1 / self.prior.noise_variance)
        probabilities = F.softmax(F.pad(free, (0, 1)), dim=-1)[..., :-1]
        return probabilities - F.one_hot(labels, free.shape[-1] + 1)[..., :-1], probabilities

    def objective(self, p: Tensor) -> Tensor:
        """[users]: negative log posterior of each user, up to a constant."""
        centred = p - self.prior.mean
        total = 0.5 * ((centred @ self.prior.precision) * centred).sum(1)
        for group in self.groups:
            _, free = self.at(p, group)
            total.index_add_(0, group.users, (self.losses(free, self.labels[group.rows]) * group.weights).sum(1))
        return total

    def derivatives(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient [users, d] and Hessian [users, d, d] of `objective`."""
        gradient = (p - self.prior.mean) @ self.prior.precision
        hessian = self.prior.precision.expand(self.count, -1, -1).clone()
        for group in self.groups:
            jacobian, free = self.at(p, group)
            residual, curvature = self.slopes(free, self.labels[group.rows])
            weights = group.weights.unsqueeze(-1)
            gradient.index_add_(0, group.users, torch.bmm((residual * weights).flatten(1).unsqueeze(1), jacobian).squeeze(1))
            curved = torch.bmm(jacobian.mT, jacobian * (curvature * weights).flatten(1).unsqueeze(-1))
            if self.task == "classification":  # softmax couples the outputs: J^T (diag(q) - q q^T) J
                mean = torch.einsum("unf,unfd->und", curvature * weights.sqrt(), jacobian.view(*free.shape, -1))
                curved -= torch.bmm(mean.mT, mean)
            hessian.index_add_(0, group.users, curved)
        return gradient, hessian

    def squared_residuals(self, p: Tensor, covariance: Tensor) -> float:
        """Sum over a regression's rows of the squared residual, expected for vectors N(p, covariance [users, d, d])."""
        total = 0.0
        for group in self.groups:
            jacobian, free = self.at(p, group)
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
