"""Writing one generation: shared weights, a segment a wave, and at the end the manifest that makes it exist.

Several processes may write different waves of one generation at the same time, and a restarted job may write on: whatever is
complete and proven stays, and the first complete object of a name wins. Knows nothing of training.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.store import names
from plora_ray.store.adapters import now_iso
from plora_ray.store.encryption.records import Records
from plora_ray.store.encryption.sealing import Place
from plora_ray.store.manifest import Beginning, Manifest, ModelRef, ObjectRef, SegmentRef, dump_json, encrypted, first_problem, load_json
from plora_ray.store.object_errors import ObjectExists
from plora_ray.store.objects import ObjectStore
from plora_ray.store.row_digests import encode_row_digests
from plora_ray.store.segments import Segment, check_users, decode_segment, encode_segment
from plora_ray.store.shared import decode_shared, encode_shared

WAVES_AT_ONCE = 4  # segments read at the same time when finished waves are verified; bounds memory
MAX_REPAIRS = 3
_SIDE_OBJECT = re.compile(r"[a-z0-9][a-z0-9_-]*\.[a-z0-9]+")
_RESERVED = (names.MANIFEST, names.BEGINNING, names.SHARED)


class GenerationWriter:
    """An unfinished generation; get one from `AdapterStore.begin`. Safe to use from several threads and processes.

    `activate` is called with the generation's id once its manifest stands.
    """

    def __init__(self, objects: ObjectStore, records: Records, beginning: Beginning, activate: Callable[[str], None]) -> None:
        self.generation = beginning.generation
        self.kind = beginning.kind
        self.version = beginning.version
        self.commit_id = uuid.uuid4().hex
        self._objects, self._records = objects, records
        self._basis: str | None = None
        self._activate = activate

    def write_shared(self, tensors: Mapping[str, torch.Tensor | np.ndarray], metadata: Mapping[str, str]) -> ObjectRef:
        """Write the shared weights, once; again with equal ones is fine. Raises StoreError if others stand there already."""
        return self._create_shared(encode_shared(tensors, metadata))

    def _create_shared(self, data: bytes) -> ObjectRef:
        path = names.shared(self.generation)
        try:
            self._objects.create(path, data)
        except ObjectExists as error:
            if self._objects.read(path) != data:
                raise StoreError(
                    f"generation {self.generation} has other shared weights already: resume from them or begin another generation"
                ) from error
        return _object_ref(path, data)

    def shared_ref(self) -> ObjectRef | None:
        """The shared weights' reference; None while they aren't written. Its sha256 is the basis of the adapters.

        Raises CorruptObjectError if what stands there isn't whole.
        """
        path = names.shared(self.generation)
        data = self._objects.read_many([path]).get(path)
        if data is None:
            return None
        decode_shared(data, self._objects.uri_of(path))
        return _object_ref(path, data)

    def write_segment(
        self, wave: int, keys: np.ndarray, records: np.ndarray, examples: np.ndarray, announce: Callable[[str], None] | None = None
    ) -> SegmentRef:
        """Write wave `wave`: keys uint8 [users, 16] ascending, records float32 [users, width], examples int [users].

        Once this returns, the wave is finished for good. If the wave was finished before, that older segment stays and its
        reference is returned. announce: is told the segment's SHA-256 before it is written, for what must be kept along with it.
        In an encrypted store each record is sealed under its user's data key, which is made if it is missing.
        Raises StoreError, with nothing written, for values that aren't finite or arrays that don't fit.
        """
        check_users(keys, records, examples, f"wave {wave} of generation {self.generation}")
        stored = self._records.seal_wave(keys, records, self._place()) if self._records.sealed else records
        data = encode_segment(keys, stored, examples, kind=self.kind, generation=self.generation, wave=wave)
        if announce is not None:
            announce(hashlib.sha256(data).hexdigest())
        path = names.segment(self.generation, wave)
        for _ in range(MAX_REPAIRS):
            try:
                self._objects.create(path, data)
                return self._reference(path, data)
            except ObjectExists:
                standing = self._objects.read_many([path]).get(path)
                if standing is not None and (reference := self._reference_or_none(path, standing)):
                    return reference
                self._objects.delete(path)  # damaged: nobody was told that it is finished
        raise StoreError(f"{self._objects.uri_of(path)} is damaged and comes back damaged: check the store")

    def _place(self) -> Place:
        """What the records are bound to. Raises StoreError before there are shared weights."""
        if self._basis is None:
            shared = self.shared_ref()
            if shared is None:
                raise StoreError(f"generation {self.generation} has no shared weights yet, and encrypted records are bound to them")
            self._basis = shared.sha256
        return Place(self.generation, self._basis, self.kind)

    def write_row_digests(self, wave: int, keys: np.ndarray, digests: np.ndarray) -> None:
        """Note what users of wave `wave` were trained on: keys uint8 [users, 16] ascending, digests uint8 [users, 16].

        Write it before the wave's segment: that one finishes the wave for good.
        """
        self._objects.write(names.row_digests(self.generation, wave), encode_row_digests(keys, digests))

    def copy_shared(self, data: bytes) -> ObjectRef:
        """Write the shared weights of another generation, byte for byte, so that adapters fitted with them fit this one, too.

        Raises StoreError if others stand there already, CorruptObjectError if these are no shared weights.
        """
        decode_shared(data, f"what generation {self.generation} is to share")
        return self._create_shared(data)

    def finished_waves(self) -> dict[int, SegmentRef]:
        """The waves that needn't be trained again. Reads and verifies every segment; a damaged one is deleted and left out."""
        paths = [item.path for item in self._objects.list(names.segments(self.generation)) if names.wave_of(item.path) is not None]
        finished = {}
        for start in range(0, len(paths), WAVES_AT_ONCE):
            for path, data in self._objects.read_many(paths[start : start + WAVES_AT_ONCE]).items():
                reference = self._reference_or_none(path, data)
                if reference is None:
                    self._objects.delete(path)
                else:
                    finished[reference.wave] = reference
        return finished

    def write_side_object(self, name: str, data: bytes) -> ObjectRef:
        """Write (or replace) an object that belongs to the generation but isn't needed to serve it, such as report.json."""
        if not _SIDE_OBJECT.fullmatch(name) or name in _RESERVED:
            raise StoreError(f"{name!r:.80} can't name a side object: use a lower-case name like report.json, none of {_RESERVED}")
        path = names.side_object(self.generation, name)
        self._objects.write(path, data)
        return _object_ref(path, data)

    def commit(
        self,
        *,
        expected_users: int,
        model: ModelRef,
        adapter_config: dict[str, Any],
        partition: dict[str, Any] | None = None,
        segments: Mapping[int, SegmentRef] | None = None,
        activate: bool = True,
        created_at: str | None = None,
    ) -> Manifest:
        """Publish the generation and, with `activate`, make it the current one.

        segments are the finished waves; without them all are read back and verified. created_at: ISO 8601, of the generation that this
        one stands in for; None: now. Raises StoreError, with nothing published,
        if shared weights are missing, segments are missing or overlap, or they don't hold exactly `expected_users` users; and if
        another writer published this generation first. Committing twice with one writer is fine.
        """
        shared = self.shared_ref()
        if shared is None:
            raise StoreError(f"generation {self.generation} has no shared weights yet: write them before committing")
        found = self.finished_waves() if segments is None else self._listed(segments)
        users = sum(segment.users for segment in found.values())
        if users != expected_users:
            raise StoreError(
                f"generation {self.generation} has {users} users in {len(found)} finished waves, expected {expected_users}: "
                "run the job again, it trains what is missing"
            )
        manifest = self._manifest(shared, list(found.values()), model, adapter_config, partition or {}, created_at or now_iso())
        self._publish(manifest)
        if activate:
            self._activate(self.generation)
        return manifest

    def _manifest(
        self, shared: ObjectRef, segments: list[SegmentRef], model: ModelRef, adapter_config: dict[str, Any], partition: dict[str, Any],
        created_at: str,
    ) -> Manifest:  # fmt: skip
        widths = {segment.width for segment in segments}
        if len(widths) > 1:
            raise StoreError(f"the waves of generation {self.generation} have records of different widths: {sorted(widths)}")
        try:
            return Manifest(
                generation=self.generation,
                version=self.version,
                commit_id=self.commit_id,
                created_at=created_at,
                kind=self.kind,
                width=widths.pop() if widths else 0,
                model=model,
                adapter_config=adapter_config,
                partition=partition,
                shared=shared,
                segments=sorted(segments, key=lambda segment: segment.first_key),
                users=sum(segment.users for segment in segments),
                examples=sum(segment.examples for segment in segments),
                **encrypted(self._records.sealed),
            )
        except ValidationError as error:
            raise StoreError(f"generation {self.generation} can't be published: {first_problem(error)}") from error

    def _publish(self, manifest: Manifest) -> None:
        path = names.manifest(self.generation)
        try:
            self._objects.create(path, dump_json(manifest))
        except ObjectExists as error:
            standing = load_json(Manifest, self._objects.read(path), self._objects.uri_of(path))
            if standing.commit_id != self.commit_id:
                raise StoreError(f"another writer published generation {self.generation} first; this one's work was discarded") from error

    def _listed(self, segments: Mapping[int, SegmentRef]) -> dict[int, SegmentRef]:
        """`segments`, after checking that each stands in the store with its size."""
        sizes = {item.path: item.size for item in self._objects.list(names.segments(self.generation))}
        for wave, segment in segments.items():
            if segment.path != names.segment(self.generation, wave) or sizes.get(segment.path) != segment.size:
                raise StoreError(f"wave {wave} of generation {self.generation} isn't in the store as it was written: run the job again")
        return dict(segments)

    def _reference_or_none(self, path: str, data: bytes) -> SegmentRef | None:
        try:
            return self._reference(path, data)
        except CorruptObjectError:
            return None

    def _reference(self, path: str, data: bytes) -> SegmentRef:
        """The reference of the segment in `data`. Raises CorruptObjectError unless every byte of it is proven."""
        segment: Segment = decode_segment(data, self._objects.uri_of(path))
        layout = segment.layout
        if (layout.generation, layout.kind, layout.wave) != (self.generation, self.kind, names.wave_of(path)):
            raise CorruptObjectError(f"{self._objects.uri_of(path)} holds another wave, generation or kind than its name says")
        if layout.sealed != self._records.sealed:
            raise CorruptObjectError(f"{self._objects.uri_of(path)} and its store don't agree on whether adapters are encrypted")
        return SegmentRef(
            path=path,
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            wave=layout.wave,
            width=layout.width,
            users=layout.users,
            examples=int(segment.examples.sum(dtype=np.int64)),
            first_key=segment.keys[0].tobytes().hex(),
            last_key=segment.keys[-1].tobytes().hex(),
            index_bytes=layout.records_at,
            index_checksum=layout.index_checksum,
        )


def _object_ref(path: str, data: bytes) -> ObjectRef:
    return ObjectRef(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
