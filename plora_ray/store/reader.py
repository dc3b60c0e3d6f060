"""Reading one published generation: its index in memory, its records by ranged requests.

Knows which bytes hold which user and proves them before it hands them out. Knows nothing of fresh adapters (`store.py` joins
the two) and keeps no cache of records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from plora_ray.errors import CorruptObjectError
from plora_ray.identity import KEY_BYTES
from plora_ray.store.adapters import UserAdapter
from plora_ray.store.manifest import Manifest, SegmentRef
from plora_ray.store.objects import ObjectRange, ObjectStore
from plora_ray.store.segments import DIGEST_BYTES, SegmentLayout, ascending, decode_index, record_digest, verify
from plora_ray.store.shared import SharedWeights, decode_shared
from plora_ray.store.tombstones import Tombstones

MAX_GAP_BYTES = 64 * 1024  # reading this much in vain costs less than a request
MAX_RANGE_BYTES = 8 * 2**20  # larger requests would keep the others waiting
RANGES_AT_ONCE = 4  # of a read of everything: bounds its memory


@dataclass(frozen=True)
class RecordBlock:
    """Records float32 [n, width] of the users from position `first` on. proven: bool [n], whether each is what was trained for its user."""

    first: int
    records: np.ndarray
    proven: np.ndarray


class GenerationReader:
    """An open generation; threads may share it. Costs about 36 bytes of memory a user.

    Opening reads the shared weights and every segment's index, all at the same time, and verifies them. Raises
    CorruptObjectError if an object isn't the one that was published, StoreError if one can't be read.
    """

    def __init__(self, objects: ObjectStore, manifest: Manifest, tombstones: Tombstones) -> None:
        self.manifest = manifest
        self._objects = objects
        self._tombstones = tombstones
        self._keys = np.empty((manifest.users, KEY_BYTES), np.uint8)
        self._digests = np.empty((manifest.users, DIGEST_BYTES), np.uint8)
        self._examples = np.empty(manifest.users, np.int32)
        # _first_rows[i] is the position of segment i's first user; the last entry is the number of users.
        self._first_rows = np.cumsum([0, *(segment.users for segment in manifest.segments)])
        self._layouts: list[SegmentLayout] = []
        self._load()
        self._sorted_keys = self._keys.view(f"V{KEY_BYTES}").ravel()  # the same memory, compared as byte strings

    @property
    def generation(self) -> str:
        return self.manifest.generation

    @property
    def basis(self) -> str:
        """SHA-256 of the shared weights: the fresh adapters that fit this generation name the same."""
        return self.manifest.shared.sha256

    @property
    def users(self) -> int:
        """Users trained in this generation, erased ones included."""
        return self.manifest.users

    @property
    def index_bytes(self) -> int:
        """Memory that the index takes."""
        return self._keys.nbytes + self._digests.nbytes + self._examples.nbytes

    def shared(self) -> SharedWeights:
        """The shared weights: CPU tensors by name, and the trainer's metadata."""
        return self._shared

    def erased_version(self, key: bytes) -> str | None:
        """The version of the user's last known erasure, if any."""
        return self._tombstones.version(key)

    def lookup(self, key: bytes) -> int | None:
        """The user's position in the index; None if the generation has no such user or the user is erased. No request."""
        return None if key in self._tombstones else self.position(key)

    def position(self, key: bytes) -> int | None:
        """As `lookup`, for erased users, too."""
        wanted = np.frombuffer(key, f"V{KEY_BYTES}")
        position = int(np.searchsorted(self._sorted_keys, wanted)[0])
        if position == self.users or self._keys[position].tobytes() != key:
            return None
        return position

    def lookup_many(self, keys: Sequence[bytes]) -> np.ndarray:
        """Positions int64 [keys], -1 where `lookup` gives None. No request."""
        if not self.users:
            return np.full(len(keys), -1)
        wanted = np.frombuffer(b"".join(keys), f"V{KEY_BYTES}")
        positions = np.searchsorted(self._sorted_keys, wanted)
        inside = np.minimum(positions, self.users - 1)
        positions[self._sorted_keys[inside] != wanted] = -1
        for place, key in enumerate(keys):
            if key in self._tombstones:
                positions[place] = -1
        return positions

    def keys(self) -> Iterator[bytes]:
        """The keys of all users that aren't erased, ascending."""
        for row in range(self.users):
            key = self._keys[row].tobytes()
            if key not in self._tombstones:
                yield key

    def get(self, key: bytes) -> UserAdapter | None:
        """The user's adapter, by one ranged request; None as `lookup`. Raises CorruptObjectError if it can't be proven."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, UserAdapter]:
        """The adapters of those of `keys` that this generation holds; neighbours share requests, which run at the same time.

        Raises CorruptObjectError if any of them can't be proven.
        """
        positions = sorted({position for key in keys if (position := self.lookup(key)) is not None})
        runs = self._runs(positions)
        answers = self._objects.read_ranges([self._range(run[0], run[-1]) for run in runs])
        adapters = {}
        for run, data in zip(runs, answers, strict=True):
            stride = self._layouts[self._segment(run[0])].width * 4
            for position in run:
                offset = (position - run[0]) * stride
                adapter = self.adapter_at(position, None if data is None else data[offset : offset + stride])
                adapters[adapter.key] = adapter
        return adapters

    def records(self) -> Iterator[RecordBlock]:
        """All records in the order of positions, a bounded piece at a time. Raises StoreError; what is damaged is marked."""
        pieces = []
        for segment in range(len(self._layouts)):
            first, stop = int(self._first_rows[segment]), int(self._first_rows[segment + 1])
            step = max(1, MAX_RANGE_BYTES // (self._layouts[segment].width * 4))
            pieces += [(start, min(start + step, stop)) for start in range(first, stop, step)]
        for begin in range(0, len(pieces), RANGES_AT_ONCE):
            group = pieces[begin : begin + RANGES_AT_ONCE]
            answers = self._objects.read_ranges([self._range(start, stop - 1) for start, stop in group])
            for (start, stop), data in zip(group, answers, strict=True):
                yield self._block(start, stop, data or b"")

    def record_range(self, position: int) -> ObjectRange:
        """Where the record of the user at `position` lies."""
        return self._range(position, position)

    def adapter_at(self, position: int, record: bytes | None) -> UserAdapter:
        """The adapter of the user at `position` from the bytes of its record; None for a segment that is gone.

        Raises CorruptObjectError unless these are the bytes that were trained for this very user.
        """
        segment = self._segment(position)
        name = self._objects.uri_of(self.manifest.segments[segment].path)
        if record is None:
            raise CorruptObjectError(f"{name} is gone although its generation is published: restore it or open another generation")
        if len(record) != self._layouts[segment].width * 4:
            raise CorruptObjectError(f"{name} is shorter than its header declares: restore it or train again")
        key = self._keys[position].tobytes()
        verify(key, record, self._digests[position].tobytes(), name)
        return UserAdapter(
            key=key,
            record=np.frombuffer(record, "<f4"),
            examples=int(self._examples[position]),
            generation=self.generation,
            version=self.manifest.version,
            updated_at=self.manifest.created_at,
            source="generation",
            basis=self.basis,
        )

    def _block(self, start: int, stop: int, data: bytes) -> RecordBlock:
        """The records from position `start` up to `stop` in the bytes that were read for them, which may be too few."""
        size = self.manifest.width * 4
        view, keys, digests = memoryview(data), self._keys[start:stop].tobytes(), self._digests[start:stop].tobytes()
        proven = np.array([
            record_digest(keys[row * KEY_BYTES : (row + 1) * KEY_BYTES], view[row * size : (row + 1) * size])
            == digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]
            for row in range(stop - start)
        ])  # fmt: skip
        whole = data if len(data) == (stop - start) * size else data.ljust((stop - start) * size, b"\0")
        return RecordBlock(start, np.frombuffer(whole, "<f4").reshape(stop - start, self.manifest.width), proven)

    def _load(self) -> None:
        manifest = self.manifest
        wanted = [ObjectRange(manifest.shared.path)]
        wanted += [ObjectRange(segment.path, 0, segment.index_bytes) for segment in manifest.segments]
        shared, *indexes = self._objects.read_ranges(wanted)
        shared_name = self._objects.uri_of(manifest.shared.path)
        if shared is None or hashlib.sha256(shared).hexdigest() != manifest.shared.sha256:
            raise CorruptObjectError(f"{shared_name} is missing or not what generation {self.generation} published: restore it")
        self._shared: SharedWeights = decode_shared(shared, shared_name)
        for number, (segment, data) in enumerate(zip(manifest.segments, indexes, strict=True)):
            self._load_index(number, segment, data)
        if not ascending(self._keys):
            raise CorruptObjectError(f"the segments of generation {self.generation} hold overlapping ranges of keys")

    def _load_index(self, number: int, segment: SegmentRef, data: bytes | None) -> None:
        name = self._objects.uri_of(segment.path)
        if data is None:
            raise CorruptObjectError(f"{name} is gone although its generation is published: restore it")
        index = decode_index(data, name)
        layout = index.layout
        given = (layout.index_checksum, layout.generation, layout.kind, layout.width, layout.users, layout.total_bytes)
        manifest = self.manifest
        if given != (segment.index_checksum, self.generation, manifest.kind, manifest.width, segment.users, segment.size):
            raise CorruptObjectError(f"{name} isn't the segment that generation {self.generation} published: restore it")
        rows = slice(int(self._first_rows[number]), int(self._first_rows[number + 1]))
        self._keys[rows], self._digests[rows], self._examples[rows] = index.keys, index.digests, index.examples
        self._layouts.append(layout)

    def _segment(self, position: int) -> int:
        return int(np.searchsorted(self._first_rows, position, side="right")) - 1

    def _range(self, first: int, last: int) -> ObjectRange:
        """The records from position `first` to `last`, which lie in one segment."""
        segment = self._segment(first)
        first_row = int(self._first_rows[segment])
        start, stop = self._layouts[segment].record_range(first - first_row, last - first_row)
        return ObjectRange(self.manifest.segments[segment].path, start, stop)

    def _runs(self, positions: list[int]) -> list[list[int]]:
        """Ascending positions, grouped so that each group is worth one request."""
        runs: list[list[int]] = []
        for position in positions:
            if runs and self._segment(position) == self._segment(runs[-1][0]):
                stride = self.manifest.width * 4
                gap, length = (position - runs[-1][-1] - 1) * stride, (position - runs[-1][0] + 1) * stride
                if gap <= MAX_GAP_BYTES and length <= MAX_RANGE_BYTES:
                    runs[-1].append(position)
                    continue
            runs.append([position])
        return runs
