"""The segment: many users' records of one generation in one safetensors file, in which any single user can be read alone.

    keys      uint8   [users, 16]     ascending, unique
    digests   uint8   [users, 16]     BLAKE2b of a user's key and record: no record can pass for another user's
    examples  int32   [users]         training rows of each user
    records   float32 [users, width]  what the generation's `kind` says: one row is one user's adapter

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
from plora_ray.store.tensorfile import TensorSpec, encode, parse_header

FORMAT_VERSION = "1"
DIGEST_BYTES = 16
MAX_EXAMPLES = 2**31 - 1
_METADATA = {"format_version", "kind", "width", "generation", "wave"}


@dataclass(frozen=True)
class SegmentLayout:
    """What a segment's header says. Offsets count from the start of the file; the index ends where the records begin."""

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

    def record_range(self, first_row: int, last_row: int) -> tuple[int, int]:
        """Byte range [start, stop) of the records of rows first_row to last_row, both included."""
        return self.records_at + first_row * self.width * 4, self.records_at + (last_row + 1) * self.width * 4


@dataclass(frozen=True)
class SegmentIndex:
    """A segment without its records: keys and digests uint8 [users, 16], examples int32 [users]."""

    layout: SegmentLayout
    keys: np.ndarray
    digests: np.ndarray
    examples: np.ndarray


@dataclass(frozen=True)
class Segment(SegmentIndex):
    """A whole segment; records float32 [users, width]."""

    records: np.ndarray


def encode_segment(keys: np.ndarray, records: np.ndarray, examples: np.ndarray, *, kind: str, generation: str, wave: int) -> bytes:
    """The bytes of a segment; equal arguments give equal bytes.

    keys uint8 [users, 16] ascending and unique, records float32 [users, width], examples int [users]; at least one user.
    Raises StoreError for anything else, and for a record with a value that isn't finite.
    """
    keys, records, examples = np.ascontiguousarray(keys), np.ascontiguousarray(records), np.asarray(examples)
    _check(keys, records, examples, f"wave {wave} of generation {generation}")
    users, width = records.shape
    counts = examples.astype("<i4").tobytes()
    record_bytes = records.astype("<f4", copy=False).data.cast("B")  # a view: a wave's records are its memory
    key_bytes = keys.tobytes()
    digests = b"".join(
        record_digest(key_bytes[row * KEY_BYTES : (row + 1) * KEY_BYTES], record_bytes[row * width * 4 : (row + 1) * width * 4])
        for row in range(users)
    )
    metadata = {"format_version": FORMAT_VERSION, "kind": kind, "width": str(width), "generation": generation, "wave": str(wave)}
    metadata["index_checksum"] = _index_checksum(metadata, key_bytes + digests + counts)
    return encode(
        [
            (TensorSpec("keys", "U8", (users, KEY_BYTES)), key_bytes),
            (TensorSpec("digests", "U8", (users, DIGEST_BYTES)), digests),
            (TensorSpec("examples", "I32", (users,)), counts),
            (TensorSpec("records", "F32", (users, width)), record_bytes),
        ],
        metadata,
    )


def parse_segment_header(data: bytes, name: str, complete: bool = True) -> SegmentLayout:
    """The layout declared by the whole segment in `data`, or (complete=False) by a beginning of it.

    Raises CorruptObjectError naming `name` when the header isn't exactly what `encode_segment` writes.
    """
    layout = parse_header(data, name, complete)
    metadata = dict(layout.metadata)
    checksum = metadata.pop("index_checksum", "")
    try:
        if set(metadata) != _METADATA or metadata["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its metadata aren't those of segment format {FORMAT_VERSION}")
        width, wave, users = int(metadata["width"]), int(metadata["wave"]), layout.tensors[0].shape[0] if layout.tensors else 0
        expected = (
            TensorSpec("keys", "U8", (users, KEY_BYTES)),
            TensorSpec("digests", "U8", (users, DIGEST_BYTES)),
            TensorSpec("examples", "I32", (users,)),
            TensorSpec("records", "F32", (users, width)),
        )
        if layout.tensors != expected or users < 1 or width < 1 or wave < 0:
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
    )


def decode_index(data: bytes, name: str, complete: bool = False) -> SegmentIndex:
    """The index from the first `records_at` bytes of a segment, with its checksum verified. Raises CorruptObjectError."""
    layout = parse_segment_header(data, name, complete)
    if len(data) < layout.records_at:
        raise CorruptObjectError(f"{name} ends within its index: {len(data)} bytes of {layout.records_at}")
    metadata = {
        "format_version": FORMAT_VERSION,
        "kind": layout.kind,
        "width": str(layout.width),
        "generation": layout.generation,
        "wave": str(layout.wave),
    }
    if _index_checksum(metadata, data[layout.keys_at : layout.records_at]) != layout.index_checksum:
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
        verify(key, record_bytes[row * layout.width * 4 : (row + 1) * layout.width * 4], digest, name)
    records = np.frombuffer(data, "<f4", layout.users * layout.width, layout.records_at).reshape(layout.users, layout.width)
    return Segment(layout, index.keys, index.digests, index.examples, records)


def record_digest(key: bytes, record: bytes | memoryview) -> bytes:
    """The 16-byte digest that binds a record (its little-endian float32 bytes) to its user."""
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


def _index_checksum(metadata: dict[str, str], index: bytes) -> str:
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=DIGEST_BYTES)
    digest.update(index)
    return digest.hexdigest()


def _check(keys: np.ndarray, records: np.ndarray, examples: np.ndarray, what: str) -> None:
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
