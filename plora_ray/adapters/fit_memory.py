"""What a fit of many users holds in memory, known before it starts."""

from __future__ import annotations

from plora_ray.adapters.problem import GROUP_ROWS
from plora_ray.adapters.solver import Solver

NEWTON_BLOCK_BYTES = 64 * 2**20  # Newton solves a wave in blocks of users of about so many bytes
_NEWTON_VECTORS = 10  # float64 [width] a user: point, gradient, direction, trial, best and what their sums pass through
_NEWTON_MATRICES = 4  # float64 [width, width] a user: Hessian, its factor, and the variance left with its right-hand side
_ADAM_PASS_RECORDS = 8  # float32 [width] a user of one pass: gathered values, gradient, moments and what the step makes of them


def newton_user_bytes(width: int) -> int:
    """Bytes that Newton's method holds for each user of a block."""
    return 8 * width * (_NEWTON_MATRICES * width + _NEWTON_VECTORS)


def newton_row_bytes(width: int, outputs: int) -> int:
    """Bytes that Newton's method holds for each row of a block: its Jacobian, float32, kept by text and stacked, and its logits."""
    return 8 * max(1, outputs - 1) * width + 16 * outputs


def fit_memory_bytes(solver: Solver, *, users: int, rows: int, width: int, outputs: int, pass_users: int) -> int:
    """Most bytes that fitting a wave holds beside the model, its activations and the passes' cache; an upper estimate.

    rows: training rows of the wave's users together. width: of a user's vector. outputs: logits a row. pass_users: users that one
    forward pass can hold. A single user whose rows alone go over Newton's block is solved whole, and holds more.
    """
    records = 4 * users * width
    if solver == "adam":  # values, their gradient, two moments, the best values, and the result on the CPU
        return 6 * records + 4 * min(pass_users, users) * width * _ADAM_PASS_RECORDS
    group = min(GROUP_ROWS, rows)  # filled up; its Jacobian twice, and the products of its users
    group_bytes = 8 * width * (group * 3 * max(1, outputs - 1) + 2 * min(group, users) * width)
    wave = users * newton_user_bytes(width) + rows * newton_row_bytes(width, outputs)
    return 2 * records + min(wave, NEWTON_BLOCK_BYTES) + group_bytes
