"""How the step size moves over a training: one rule for every stage and every baseline. Pure arithmetic."""

from __future__ import annotations


def learning_rate_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """What step number `step` of `steps` multiplies the learning rate by: linear warm-up, then linear decay to a tenth."""
    warmup = max(1, round(warmup_fraction * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 - 0.9 * min(1.0, (step - warmup) / max(1, steps - warmup))
