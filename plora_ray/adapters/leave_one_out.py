"""Does a fit help its user? Every row under the vector fitted without that row, against the same row under another vector.

No row is held back and nothing is fitted again: leaving row i out moves the mode by one Newton step, whose Hessian is the
fit's own without that row. With r and W the gradient and curvature of the row's loss in its logits,

    z_i(p_-i) ~ z_i(p) + S (I - W S)^-1 r        S = J_i H^-1 J_i^T

(each of the two times what the row counts, where rows don't count the same), which is exact for a regression (Allen 1974) and close for
a classification (Rad and Maleki 2020).

A user's gains in nats, each times what its row counts, add up to the logarithm of how much likelier the rows are with the vector than
without. That is the whole evidence: a spread of gains says little beside it, as many rows lose a trifle and few gain much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from plora_ray.adapters.problem import FitProblem, Group

EVIDENCE_NATS = 1.0  # what a user must lose over all rows: the prior, made of everybody, speaks for the fit


def harmed(problem: FitProblem, modes: Tensor, factor: Tensor, other: Tensor) -> Tensor:
    """[users] bool: whose rows, each left out, are less likely by EVIDENCE_NATS under the modes than under `other`.

    Arguments as those of `left_out_gains`.
    """
    return left_out_gains(problem, modes, factor, other) < -EVIDENCE_NATS


def left_out_gains(problem: FitProblem, modes: Tensor, factor: Tensor, other: Tensor) -> Tensor:
    """[users], nats: sum over a user's rows of the loss under `other` less the loss under what is kept of the mode without the row.

    modes: [users, d]; factor: [users, d, d] Cholesky factors of the Hessians there; other: [d] or [users, d]; all float64.
    """
    total = torch.zeros(problem.count, dtype=torch.float64)
    covariance, others, prior = torch.cholesky_inverse(factor), other.expand_as(modes), problem.prior
    for group in problem.groups:
        jacobian, free = problem.at(modes, group)
        labels = problem.labels[group.rows]
        without = free + _moved(problem, group, free, jacobian, covariance[group.users])
        without = torch.lerp(problem.at(prior.mean.expand_as(modes), group)[1], without, prior.lasting)  # as far as the fit is kept
        gains = problem.losses(problem.at(others, group)[1], labels) - problem.losses(without, labels)
        total.index_add_(0, group.users, (gains * group.weights).sum(1))
    return total


def _moved(problem: FitProblem, group: Group, free: Tensor, jacobian: Tensor, covariance: Tensor) -> Tensor:
    """How far the logits [u, n, free] of each row move when the row is left out. jacobian: [u, n x free, d]; covariance: [u, d, d]."""
    residual, curvature = problem.slopes(free, problem.labels[group.rows])
    by_row = (*free.shape, jacobian.shape[-1])
    leverage = torch.bmm(jacobian, covariance).view(by_row) @ jacobian.view(by_row).mT  # S, [u, n, free, free]
    curved = torch.diag_embed(curvature)
    if problem.task == "classification":
        curved = curved - curvature.unsqueeze(-1) * curvature.unsqueeze(-2)
    counts = group.weights[..., None, None]
    own = torch.eye(free.shape[-1], dtype=free.dtype) - counts * curved @ leverage
    return (leverage @ torch.linalg.solve(own, counts * residual.unsqueeze(-1))).squeeze(-1)
