"""The users of a wave on their way into its segment: those a rank has just fitted, and those that come over unchanged.

Knows plans, keys and records; knows nothing of fitting.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

import numpy as np

from plora_ray.identity import KEY_BYTES, as_words
from plora_ray.store import GenerationReader, GenerationWriter
from plora_ray.store.manifest import SegmentRef
from plora_ray.training.plan import Action, PartitionPlan
from plora_ray.training.waves import Wave


@dataclass(frozen=True)
class SegmentUsers:
    """Users ready for a segment: keys uint8 [users, 16] ascending, records float32 [users, width], examples int32 [users]."""

    keys: np.ndarray
    records: np.ndarray
    examples: np.ndarray


class WaveUsers:
    """The users of waves as a rank writes them: those it has fitted, and those that come from the base unchanged.

    plans: of the partitions that the rank owns. base: None if everybody is fitted.
    """

    def __init__(self, plans: dict[int, PartitionPlan], base: GenerationReader | None, writer: GenerationWriter) -> None:
        self._plans, self._base, self._writer = plans, base, writer

    def to_fit(self, wave: Wave) -> np.ndarray:
        """Keys of the wave's users that are to be fitted, uint8 [users, 16]."""
        plan, span = self._plans[wave.partition], slice(wave.start, wave.stop)
        return plan.keys[span][plan.actions[span] == Action.FIT]

    def unchanged(self, wave: Wave, erased: Set[bytes]) -> SegmentUsers:
        """The wave's other users, without those erased meanwhile. Raises CorruptObjectError if a record can't be proven."""
        plan, span = self._plans[wave.partition], slice(wave.start, wave.stop)
        found: dict[bytes, tuple[np.ndarray, int]] = {}
        if self._base is not None:
            carried = [key.tobytes() for key in plan.keys[span][plan.actions[span] == Action.CARRY]]
            found = {key: (adapter.record, adapter.examples) for key, adapter in self._base.get_many(carried).items()}
        folds = np.flatnonzero(plan.actions == Action.FOLD)
        for place in np.flatnonzero((folds >= wave.start) & (folds < wave.stop)):
            record, examples = plan.folded_records[place], int(plan.folded_examples[place])
            found[plan.keys[folds[place]].tobytes()] = (record, examples)
        kept = sorted(found.keys() - erased)
        records = np.stack([found[key][0] for key in kept]) if kept else np.empty((0, 0), np.float32)
        return SegmentUsers(_as_keys(kept), records, np.array([found[key][1] for key in kept], np.int32))

    def write(self, wave: Wave, fitted: SegmentUsers, copied: SegmentUsers, announce: Callable[[str | None], None]) -> SegmentRef | None:
        """Write the wave's row digests and then its segment, which finishes it; no segment for a wave whose users are all gone.

        announce: is told the segment's SHA-256 before it is written, or None if there is none. Returns what stands in the store.
        """
        keys = np.concatenate([fitted.keys, copied.keys])
        if not len(keys):
            announce(None)
            return None
        order = np.lexsort(keys[:, ::-1].T)
        plan, span = self._plans[wave.partition], slice(wave.start, wave.stop)
        present = np.isin(as_words(plan.keys[span]), as_words(keys)) & plan.digests[span].any(axis=1)
        self._writer.write_row_digests(wave.index, plan.keys[span][present], plan.digests[span][present])
        records = np.concatenate([part.records for part in (fitted, copied) if len(part.keys)])
        examples = np.concatenate([fitted.examples, copied.examples])
        return self._writer.write_segment(wave.index, keys[order], records[order], examples[order], announce)


def _as_keys(items: list[bytes]) -> np.ndarray:
    """uint8 [items, 16]."""
    return np.frombuffer(b"".join(items), np.uint8).reshape(-1, KEY_BYTES)
