"""What a published generation still holds of users who were erased: bytes that no reader serves, and that have to go.

Looks at keys only. Knows no readers and no caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from plora_ray.identity import KEY_BYTES, as_words
from plora_ray.store.adapter_store import AdapterStore
from plora_ray.store.manifest import Manifest, SegmentRef
from plora_ray.store.objects import ObjectRange
from plora_ray.store.row_digests import read_row_digests
from plora_ray.store.segments import decode_index

INDEXES_AT_ONCE = 32  # bounds memory


@dataclass(frozen=True)
class ErasedBytes:
    """records, row_digests: erased users of whom a generation's segments hold a record, and of whose rows it keeps a digest."""

    records: int
    row_digests: int

    @property
    def any(self) -> bool:
        return bool(self.records or self.row_digests)


def erased_bytes(store: AdapterStore, manifest: Manifest) -> ErasedBytes:
    """What the generation holds of all users with a tombstone, also of those who came back since: what they left is gone for good.

    Reads the segments' indexes and the row digests; nothing if nobody was ever erased. Raises StoreError, CorruptObjectError.
    """
    erased = store.tombstones().keys()
    if not erased:
        return ErasedBytes(0, 0)
    wanted = as_words(np.frombuffer(b"".join(sorted(erased)), np.uint8).reshape(-1, KEY_BYTES))
    records = 0
    for start in range(0, len(manifest.segments), INDEXES_AT_ONCE):
        some = manifest.segments[start : start + INDEXES_AT_ONCE]
        indexes = store.objects.read_ranges([ObjectRange(segment.path, 0, segment.index_bytes) for segment in some])
        records += sum(_found(store, segment, data, wanted) for segment, data in zip(some, indexes, strict=True))
    keys, _ = read_row_digests(store.objects, manifest.generation)
    return ErasedBytes(records, int(np.isin(as_words(keys), wanted).sum()))


def _found(store: AdapterStore, segment: SegmentRef, data: bytes | None, wanted: np.ndarray) -> int:
    index = decode_index(data or b"", store.objects.uri_of(segment.path))
    return int(np.isin(as_words(index.keys), wanted).sum())
