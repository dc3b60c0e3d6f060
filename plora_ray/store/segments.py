"""The segment: many users' records of one generation in one safetensors file, in which any single user can be read alone.

    keys      uint8   [users, 16]     ascending, unique
    digests   uint8   [users, 16]     BLAKE2b of a user's key and record: no record can pass for another user's
    examples  int32   [users]         training rows of each user
    records   float32 [users, width]  what the generation's `kind` says: one row is one user's adapter
              uint8   [users, 28 + 4 width]  in format 2: the same, sealed; the digests are of what stands here

The first three are the index. It stands before the records, so that one ranged GET brings it and one more brings any record.
The metadata carry a checksum over themselves and the index; the digests cover the records: every byte is accounted for.
Knows the bytes of a segment; doesn't know where segments lie or which users may still be served.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.identity import KEY_BYTES
from plora_ray.store.encryption.sealing import ALGORITHM, is_sealed, stored_bytes
from plora_ray.store.tensorfile import TensorSpec, encode, parse_header

FORMAT_VERSION = "1"
SEALED_FORMAT_VERSION = "2"
DIGEST_BYTES = 16
MAX_EXAMPLES = 2**31 - 1
_METADATA = {"format_version", "kind", "width", "generation", "wave"}
_SEALED_METADATA = {*_METADATA, "encryption"}


@dataclass(frozen=True)
class SegmentLayout:
    """What a segment's header says. Offsets count from the start of the file; the index ends where the records begin.

    sealed: whether its records are encrypted. metadata: all of the header's but the checksum.
    """

    kind: str
    width: int
    generation: str
    wave: int
    users: int
    index_checksum: str
    keys_at: int
    digests_at: int
    examples_at: int
    records_at: int
    total_bytes: int
    sealed: bool
    metadata: dict[str, str]

    @property
    def record_bytes(self) -> int:
        """Bytes of one record as it is stored."""
        return stored_bytes(self.width, self.sealed)

    def record_range(self, first_row: int, last_row: int) -> tuple[int, int]:
        """Byte range [start, stop) of the records of rows first_row to last_row, both included."""
        return self.records_at + first_row * self.record_bytes, self.records_at + (last_row + 1) * self.record_bytes


@dataclass(frozen=True)
class SegmentIndex:
    """A segment without its records: keys and digests uint8 [users, 16], examples int32 [users]."""

    layout: SegmentLayout
    keys: np.ndarray
    digests: np.ndarray
    examples: np.ndarray


@dataclass(frozen=True)
class Segment(SegmentIndex):
    """A whole segment; records float32 [users, width], or sealed, uint8 [users, 28 + 4 width]."""

    records: np.ndarray


def encode_segment(keys: np.ndarray, records: np.ndarray, examples: np.ndarray, *, kind: str, generation: str, wave: int) -> bytes:
    """The bytes of a segment; equal arguments give equal bytes.

    keys uint8 [users, 16] ascending and unique, records float32 [users, width], or sealed, uint8 [users, 28 + 4 width],
    examples int [users]; at least one user. Raises StoreError for anything else, and for a value that isn't finite.
    """
    keys, records, examples = np.ascontiguousarray(keys), np.ascontiguousarray(records), np.asarray(examples)
    sealed = is_sealed(records)
    if not sealed:
        check_users(keys, records, examples, f"wave {wave} of generation {generation}")
    users, size = len(keys), records.shape[1] * records.itemsize
    width = (size - stored_bytes(0, sealed)) // 4
    counts = examples.astype("<i4").tobytes()
    record_bytes = (records if sealed else records.astype("<f4", copy=False)).data.cast("B")  # not copied: waves are large
    key_bytes = keys.tobytes()
    digests = b"".join(
        record_digest(key_bytes[row * KEY_BYTES : (row + 1) * KEY_BYTES], record_bytes[row * size : (row + 1) * size])
        for row in range(users)
    )
    version = SEALED_FORMAT_VERSION if sealed else FORMAT_VERSION
    metadata = {"format_version": version, "kind": kind, "width": str(width), "generation": generation, "wave": str(wave)}
    metadata |= {"encryption": ALGORITHM} if sealed else {}
    checksum = _index_checksum(metadata, key_bytes + digests + counts)
    body = (key_bytes, digests, counts, record_bytes)
    return encode(list(zip(_specs(users, width, sealed), body, strict=True)), metadata | {"index_checksum": checksum})


def parse_segment_header(data: bytes, name: str, complete: bool = True) -> SegmentLayout:
    """The layout declared by the whole segment in `data`, or (complete=False) by a beginning of it.

    Raises CorruptObjectError naming `name` when the header isn't exactly what `encode_segment` writes.
    """
    layout = parse_header(data, name, complete)
    metadata = dict(layout.metadata)
    checksum = metadata.pop("index_checksum", "")
    try:
        sealed = metadata.get("format_version") == SEALED_FORMAT_VERSION
        if set(metadata) != (_SEALED_METADATA if sealed else _METADATA) or metadata.get("encryption", ALGORITHM) != ALGORITHM:
            raise ValueError(f"its metadata aren't those of segment format {FORMAT_VERSION} or {SEALED_FORMAT_VERSION}")
        if not sealed and metadata["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format {metadata['format_version']!r:.20} isn't {FORMAT_VERSION} or {SEALED_FORMAT_VERSION}")
        width, wave, users = int(metadata["width"]), int(metadata["wave"]), layout.tensors[0].shape[0] if layout.tensors else 0
        if layout.tensors != _specs(users, width, sealed) or users < 1 or width < 1 or wave < 0:
            raise ValueError("its tensors aren't keys, digests, examples and records of matching shapes")
    except (ValueError, IndexError) as error:
        raise CorruptObjectError(f"{name} is no segment: {error}") from error
    starts = layout.starts
    return SegmentLayout(
        kind=metadata["kind"],
        width=width,
        generation=metadata["generation"],
        wave=wave,
        users=users,
        index_checksum=checksum,
        keys_at=starts["keys"],
        digests_at=starts["digests"],
        examples_at=starts["examples"],
        records_at=starts["records"],
        total_bytes=layout.total_bytes,
        sealed=sealed,
        metadata=metadata,
    )


def decode_index(data: bytes, name: str, complete: bool = False) -> SegmentIndex:
    """The index from the first `records_at` bytes of a segment, with its checksum verified. Raises CorruptObjectError."""
    layout = parse_segment_header(data, name, complete)
    if len(data) < layout.records_at:
        raise CorruptObjectError(f"{name} ends within its index: {len(data)} bytes of {layout.records_at}")
    if _index_checksum(layout.metadata, data[layout.keys_at : layout.records_at]) != layout.index_checksum:
        raise CorruptObjectError(f"{name} doesn't match the checksum of its index")
    keys = np.frombuffer(data, np.uint8, layout.users * KEY_BYTES, layout.keys_at).reshape(layout.users, KEY_BYTES)
    digests = np.frombuffer(data, np.uint8, layout.users * DIGEST_BYTES, layout.digests_at).reshape(layout.users, DIGEST_BYTES)
    examples = np.frombuffer(data, "<i4", layout.users, layout.examples_at)
    if not ascending(keys):
        raise CorruptObjectError(f"{name} has keys that aren't ascending and unique")
    return SegmentIndex(layout, keys, digests, examples)


def decode_segment(data: bytes, name: str) -> Segment:
    """The whole segment, with every digest verified. Raises CorruptObjectError naming `name`."""
    index = decode_index(data, name, complete=True)
    layout = index.layout
    keys, digests, record_bytes = index.keys.tobytes(), index.digests.tobytes(), memoryview(data)[layout.records_at :]
    for row in range(layout.users):
        key, digest = keys[row * KEY_BYTES : (row + 1) * KEY_BYTES], digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]
        verify(key, record_bytes[row * layout.record_bytes : (row + 1) * layout.record_bytes], digest, name)
    records = np.frombuffer(data, np.uint8 if layout.sealed else "<f4", offset=layout.records_at).reshape(layout.users, -1)
    return Segment(layout, index.keys, index.digests, index.examples, records)


def record_digest(key: bytes, record: bytes | memoryview) -> bytes:
    """The 16-byte digest that binds a record (its bytes as stored; plain ones are little-endian float32) to its user."""
    digest = hashlib.blake2b(key, digest_size=DIGEST_BYTES)
    digest.update(record)
    return digest.digest()


def verify(key: bytes, record: bytes | memoryview, digest: bytes, name: str) -> None:
    """Raises CorruptObjectError naming `name` unless `record` is the one that was written for the user `key`."""
    if record_digest(key, record) != digest:
        raise CorruptObjectError(f"{name} holds a record that doesn't match its user's digest: restore the object or train again")


def ascending(keys: np.ndarray) -> bool:
    """Whether keys uint8 [users, 16] are strictly ascending as byte strings."""
    halves = np.ascontiguousarray(keys).view(">u8")  # [users, 2]
    high, low = halves[:, 0], halves[:, 1]
    return bool(np.all((high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))))


def _specs(users: int, width: int, sealed: bool) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec("keys", "U8", (users, KEY_BYTES)),
        TensorSpec("digests", "U8", (users, DIGEST_BYTES)),
        TensorSpec("examples", "I32", (users,)),
        TensorSpec("records", "U8", (users, stored_bytes(width, True))) if sealed else TensorSpec("records", "F32", (users, width)),
    )


def _index_checksum(metadata: dict[str, str], index: bytes) -> str:
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=DIGEST_BYTES)
    digest.update(index)
    return digest.hexdigest()


def check_users(keys: np.ndarray, records: np.ndarray, examples: np.ndarray, what: str) -> None:
    """Raises StoreError naming `what` unless these plain records and their users may become a segment."""
    if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES or len(keys) == 0:
        raise StoreError(f"{what}: keys must be uint8 [users, {KEY_BYTES}] of at least one user, got {keys.dtype} {list(keys.shape)}")
    if records.dtype != np.float32 or records.ndim != 2 or len(records) != len(keys) or records.shape[1] == 0:
        raise StoreError(f"{what}: records must be float32 [{len(keys)}, width], got {records.dtype} {list(records.shape)}")
    if examples.dtype.kind not in "iu" or examples.shape != (len(keys),):
        raise StoreError(f"{what}: examples must be integers [{len(keys)}], got {examples.dtype} {list(examples.shape)}")
    if examples.min() < 0 or examples.max() > MAX_EXAMPLES:
        raise StoreError(f"{what}: numbers of examples must lie between 0 and {MAX_EXAMPLES}")
    if not ascending(keys):
        raise StoreError(f"{what}: keys must be ascending and unique")
    finite = np.isfinite(records).all(axis=1)
    if not finite.all():
        raise StoreError(f"{what}: {int((~finite).sum())} of {len(keys)} records hold NaN or infinite values; nothing was written")
