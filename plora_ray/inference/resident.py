"""All records of a generation in memory, so that no trained user is ever cold: a lookup is a row of one array.

Knows records by position; knows nothing of fresh adapters, which may be newer than a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from plora_ray.store import GenerationReader


class ResidentRecords:
    """Records float32 [users, width] of an open generation, read a bounded piece at a time and proven on the way.

    A damaged record is no row: its user is looked for in the store, which says what is wrong. Raises StoreError.
    """

    def __init__(self, reader: GenerationReader) -> None:
        self._reader = reader
        self._records = np.zeros((reader.users, reader.manifest.width), np.float32)
        self._proven = np.zeros(reader.users, bool)
        for block in reader.records():
            rows = slice(block.first, block.first + len(block.records))
            self._records[rows], self._proven[rows] = block.records, block.proven

    @staticmethod
    def bytes_of(reader: GenerationReader) -> int:
        """Memory that the generation's records take."""
        return reader.users * reader.manifest.width * 4

    @property
    def users(self) -> int:
        """Users with a row."""
        return int(self._proven.sum())

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self._records.nbytes

    def rows(self, keys: Sequence[bytes]) -> list[np.ndarray | None]:
        """Each user's record [width]; None for a user who isn't in the generation, is erased, or whose record is damaged.

        The records are rows of one copy, so what happens to the user afterwards doesn't change what was handed out.
        """
        if not len(self._records):
            return [None] * len(keys)
        positions = self._reader.lookup_many(keys)
        found = (positions >= 0) & self._proven[positions]
        taken = iter(self._records[positions[found]])
        return [next(taken) if is_here else None for is_here in found]

    def forget(self, keys: Iterable[bytes]) -> None:
        """Wipe these users' records."""
        for key in keys:
            position = self._reader.position(key)
            if position is not None:
                self._proven[position] = False
                self._records[position] = 0
