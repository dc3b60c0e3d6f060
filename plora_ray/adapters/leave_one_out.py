"""Does a fit help its user? Every row's loss under the vector fitted without that row, against the loss under another vector.

No row is held back and nothing is fitted again: leaving row i out moves the mode by one Newton step, whose Hessian is the
fit's own without that row. With r and W the gradient and curvature of the row's loss in its logits,

    z_i(p_-i) ~ z_i(p) + S (I - W S)^-1 r        S = J_i H^-1 J_i^T

which is exact for a regression (Allen 1974) and close for a classification (Rad and Maleki 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from plora_ray.adapters.problem import FitProblem

FEWEST_ROWS = 5  # of a user: below it the prior decides, not the user's luck
NOISE = 1.0  # standard errors that a user must lose by


@dataclass(frozen=True)
class LeftOutGains:
    """What users' rows gain when left out, over the other vector. sums, squares: [users] over a user's rows; rows: [users]."""

    sums: Tensor
    squares: Tensor
    rows: Tensor

    @property
    def harmed(self) -> Tensor:
        """[users] bool: the mean gain lies below zero by more than NOISE standard errors."""
        rows = self.rows.clamp(min=2)
        mean = self.sums / rows
        error = ((self.squares / rows - mean.square()).clamp(min=0) / (rows - 1)).sqrt()
        return (self.rows >= FEWEST_ROWS) & (mean < -NOISE * error)


def harmed(problem: FitProblem, modes: Tensor, factor: Tensor, other: Tensor) -> Tensor:
    """[users] bool: who is harmed by the mode [users, d] in place of `other` [d] or [users, d]. factor: see `left_out_gains`."""
    return left_out_gains(problem, modes, factor, other).harmed


def left_out_gains(problem: FitProblem, modes: Tensor, factor: Tensor, other: Tensor) -> LeftOutGains:
    """Gains of all users. factor: [users, d, d] Cholesky factors of the Hessians at the modes; all float64."""
    sums, squares = torch.zeros(2, problem.count, dtype=torch.float64)
    rows = torch.zeros(problem.count, dtype=torch.float64)
    covariance, others = torch.cholesky_inverse(factor), other.expand_as(modes)
    for group in problem.groups:
        jacobian, free = problem.at(modes, group)
        labels = problem.labels[group.rows]
        without = free + _moved(problem, free, jacobian, covariance[group.users], labels)
        gains = (problem.losses(problem.at(others, group)[1], labels) - problem.losses(without, labels)) * group.weights
        sums.index_add_(0, group.users, gains.sum(1))
        squares.index_add_(0, group.users, gains.square().sum(1))
        rows.index_add_(0, group.users, group.weights.sum(1))
    return LeftOutGains(sums, squares, rows)


def _moved(problem: FitProblem, free: Tensor, jacobian: Tensor, covariance: Tensor, labels: Tensor) -> Tensor:
    """How far the logits [u, n, free] of each row move when the row is left out. jacobian: [u, n x free, d]; covariance: [u, d, d]."""
    residual, curvature = problem.slopes(free, labels)
    by_row = (*free.shape, jacobian.shape[-1])
    leverage = torch.bmm(jacobian, covariance).view(by_row) @ jacobian.view(by_row).mT  # S, [u, n, free, free]
    curved = torch.diag_embed(curvature)
    if problem.task == "classification":
        curved = curved - curvature.unsqueeze(-1) * curvature.unsqueeze(-2)
    own = torch.eye(free.shape[-1], dtype=free.dtype) - curved @ leverage
    return (leverage @ torch.linalg.solve(own, residual.unsqueeze(-1))).squeeze(-1)
