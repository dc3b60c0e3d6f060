"""A published generation's segments on their way into an encrypted store: opened, and sealed anew under the keys of users there.

Records of erased users stay behind. Knows segments and manifests; `transfer.py` knows everything else that is copied.
"""

from __future__ import annotations

import numpy as np

from plora_ray.store.adapter_store import AdapterStore
from plora_ray.store.encryption.records import UnreadableRecord
from plora_ray.store.encryption.sealing import Place
from plora_ray.store.manifest import Beginning, Manifest, SegmentRef, encrypted
from plora_ray.store.segments import decode_segment
from plora_ray.store.writer import GenerationWriter


class WaveSealing:
    """One generation's way from `source` into `target`, which is encrypted; the target must know the source's erasures."""

    def __init__(self, source: AdapterStore, manifest: Manifest, target: AdapterStore) -> None:
        self._source, self._manifest = source, manifest
        self._place = Place(manifest.generation, manifest.shared.sha256, manifest.kind)
        beginning = Beginning(generation=manifest.generation, version=manifest.version, kind=manifest.kind)
        self._writer = GenerationWriter(target.objects, target.records, beginning, target.activate)
        self._written: list[SegmentRef] = []

    def write(self, path: str, data: bytes) -> None:
        """Write the segment in `data`, which was read from `path`. Raises CorruptObjectError if a record can't be opened."""
        name = self._source.objects.uri_of(path)
        segment, erased = decode_segment(data, name), self._source.tombstones().keys()
        keys = [key.tobytes() for key in segment.keys]
        stored = {key: (segment.records[row], self._place) for row, key in enumerate(keys) if key not in erased}
        opened, unreadable = self._source.records.open_many(stored, name)
        if set(unreadable) - self._source.tombstones().keys():
            raise UnreadableRecord(f"{name} holds records that can't be decrypted: `plora store fsck` tells more")
        rows = [row for row, key in enumerate(keys) if key in opened]
        if rows:
            records = np.stack([opened[keys[row]] for row in rows])
            wave = segment.layout.wave
            self._written.append(self._writer.write_segment(wave, segment.keys[rows], records, segment.examples[rows]))

    def manifest(self) -> Manifest:
        """The generation's manifest with the segments that were written."""
        users, examples = sum(item.users for item in self._written), sum(item.examples for item in self._written)
        changed = {"segments": self._written, "users": users, "examples": examples, **encrypted(True)}
        return Manifest(**{**dict(self._manifest), **changed})
