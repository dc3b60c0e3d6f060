"""Where every object of a store lies. Names derive from generation ids, wave numbers and hashed user keys, never from raw ids."""

from __future__ import annotations

import re

IDENTITY = "store.json"
CURRENT = "current"
CANARY = "canary"
GENERATIONS = "generations"
ERASED = "erased"
FRESH = "users"
EXAMPLES = "examples"
USED = "used"
USED_SINCE = f"{USED}/since.json"
MANIFEST = "manifest.json"
BEGINNING = "begun.json"
SHARED = "shared.safetensors"
KEYS = "keys"
KEY_RING = "keys/ring.json"

_SEGMENT = re.compile(r".*/segments/(\d{5,})\.safetensors")
_FRESH = re.compile(FRESH + r"/[0-9a-f]{2}/([0-9a-f]{32})\.safetensors")
_KEY_SHARD = re.compile(KEYS + r"/([0-9a-f]{2})\.safetensors")
_EXAMPLES = re.compile(EXAMPLES + r"/[0-9a-f]{2}/([0-9a-f]{32})\.safetensors")
_USED = re.compile(USED + r"/(\d{4}-\d{2}-\d{2})/[0-9a-f]{32}\.safetensors")
_TOMBSTONE = re.compile(ERASED + r"/([0-9a-f]{32})\.json")


def manifest(generation: str) -> str:
    return f"{GENERATIONS}/{generation}/{MANIFEST}"


def beginning(generation: str) -> str:
    return f"{GENERATIONS}/{generation}/{BEGINNING}"


def shared(generation: str) -> str:
    return f"{GENERATIONS}/{generation}/{SHARED}"


def generation_of(path: str) -> str | None:
    """The generation in whose folder `path` lies; None outside of them."""
    parts = path.split("/")
    return parts[1] if len(parts) > 2 and parts[0] == GENERATIONS else None


def segments(generation: str) -> str:
    return f"{GENERATIONS}/{generation}/segments"


def segment(generation: str, wave: int) -> str:
    return f"{segments(generation)}/{wave:05d}.safetensors"


def row_digests(generation: str, wave: int | None = None) -> str:
    """The wave's object, or the folder of all waves'."""
    folder = f"{GENERATIONS}/{generation}/sources"
    return folder if wave is None else f"{folder}/{wave:05d}.safetensors"


def wave_of(path: str) -> int | None:
    """The wave whose segment lies at `path`; None if that is no segment's name."""
    match = _SEGMENT.fullmatch(path)
    return int(match[1]) if match else None


def side_object(generation: str, name: str) -> str:
    return f"{GENERATIONS}/{generation}/{name}"


def fresh(key: bytes) -> str:
    # Two hex digits as a folder keep a million users from sharing one directory.
    return f"{FRESH}/{key.hex()[:2]}/{key.hex()}.safetensors"


def fresh_key(path: str) -> bytes | None:
    """The key whose fresh object lies at `path`; None if that is no fresh object's name."""
    match = _FRESH.fullmatch(path)
    return bytes.fromhex(match[1]) if match else None


def examples(key: bytes) -> str:
    return f"{EXAMPLES}/{key.hex()[:2]}/{key.hex()}.safetensors"


def examples_key(path: str) -> bytes | None:
    """The key of the user whose retained examples lie at `path`; None if that is no such name."""
    match = _EXAMPLES.fullmatch(path)
    return bytes.fromhex(match[1]) if match else None


def used(day: str, name: str) -> str:
    return f"{USED}/{day}/{name}.safetensors"


def used_day(path: str) -> str | None:
    """The day, as ISO 8601, whose users the object at `path` holds; None if that is no such name."""
    match = _USED.fullmatch(path)
    return match[1] if match else None


def tombstone(key: bytes) -> str:
    return f"{ERASED}/{key.hex()}.json"


def erased_key(path: str) -> bytes | None:
    """The key whose tombstone lies at `path`; None if that is no tombstone's name."""
    match = _TOMBSTONE.fullmatch(path)
    return bytes.fromhex(match[1]) if match else None


def key_shard(first_byte: int) -> str:
    """Where the data keys of users whose keys begin with this byte lie."""
    return f"{KEYS}/{first_byte:02x}.safetensors"


def key_shard_byte(path: str) -> int | None:
    """The first byte of the users' keys whose data keys lie at `path`; None if that is no shard's name."""
    match = _KEY_SHARD.fullmatch(path)
    return int(match[1], 16) if match else None
