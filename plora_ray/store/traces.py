"""What a store still holds of one user, erased or not: proof for whoever asks.

Looks at bytes, not at what is served: a tombstone hides a record from every reader, but not from here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from plora_ray.identity import KEY_BYTES, as_words
from plora_ray.store import names
from plora_ray.store.adapter_store import AdapterStore
from plora_ray.store.manifest import SegmentRef
from plora_ray.store.retained import count_examples
from plora_ray.store.row_digests import read_row_digests
from plora_ray.store.segments import decode_index
from plora_ray.store.tombstones import tombstone_version


@dataclass(frozen=True)
class Traces:
    """records: published generations in whose segments the user's record lies. row_digests: those that keep a digest of the user's rows.

    fresh_adapter: whether one of the user's lies below users/. retained_examples: how many lie below examples/. data_key: whether there
    is a key that opens what is encrypted of the user; None in a store without encryption. erased: when the user was last erased, as a
    version. unfinished: generations and runs that are not published, where nobody looked.
    """

    records: list[str]
    row_digests: list[str]
    fresh_adapter: bool
    retained_examples: int
    data_key: bool | None
    erased: str | None
    unfinished: list[str]


def traces_of(store: AdapterStore, key: bytes) -> Traces:
    """Every trace of the user `key`. One request a generation and a few more. Raises StoreError, CorruptObjectError."""
    records, digests = [], []
    published = [info.generation for info in store.generations()]
    for generation in published:
        manifest = store.manifest(generation)
        if manifest is not None and any(_holds(store, segment, key) for segment in manifest.segments):
            records.append(generation)
        keys, _ = read_row_digests(store.objects, generation)
        if (keys == np.frombuffer(key, np.uint8)).all(axis=1).any():
            digests.append(generation)
    standing = store.fresh.read(key)
    fresh, data_key = standing is not None and standing.adapter is not None, None if store.keys is None else store.keys.has(key)
    unfinished = sorted(set(store.objects.folders(names.GENERATIONS)) - set(published))
    runs = [f"runs/{name}" for name in store.objects.folders("runs")]
    erased, retained = tombstone_version(store.objects, key), count_examples(store.objects, key)
    return Traces(records, digests, fresh, retained, data_key, erased, unfinished + runs)


def _holds(store: AdapterStore, segment: SegmentRef, key: bytes) -> bool:
    if not segment.first_key <= key.hex() <= segment.last_key:
        return False
    index = decode_index(store.objects.read_range(segment.path, 0, segment.index_bytes), store.objects.uri_of(segment.path))
    return bool((as_words(index.keys) == as_words(np.frombuffer(key, np.uint8).reshape(1, KEY_BYTES))).any())
