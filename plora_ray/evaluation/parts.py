"""Comparisons on parts of the rows, such as groups of people or times: of many parts some differ by chance, and p-values must say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from plora_ray.evaluation.comparison import Comparison
from plora_ray.evaluation.metrics import holm


def held_together(parts: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The same with every gain's p adjusted over the parts, too (Holm), so that all of a table hold together."""
    found = dict(parts)
    tested = {(over, metric) for part in parts.values() for over, gains in part.gains.items() for metric in gains}
    for over, metric in sorted(tested):
        names = [name for name, part in parts.items() if part.users > 1 and metric in part.gains.get(over, {})]  # one alone shows nothing
        for name, p in zip(names, holm([parts[name].gains[over][metric].p for name in names]), strict=True):
            gains = found[name].gains
            changed = {**gains[over], metric: replace(gains[over][metric], p=p)}
            found[name] = replace(found[name], gains={**gains, over: changed})
    return found
