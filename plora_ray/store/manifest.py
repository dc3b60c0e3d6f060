"""The manifest: the one object whose presence makes a generation exist, and which names and pins every other object of it.

Knows the JSON and its rules; reads and writes nothing itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.store.encryption.sealing import ALGORITHM

FORMAT_VERSION: Final = "1"
ENCRYPTED_FORMAT_VERSION: Final = "2"
_GENERATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
KeyHex = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Model = TypeVar("_Model", bound=BaseModel)


def check_generation_id(generation: str) -> str:
    """Return `generation` if it may name one: it becomes part of object names. Raises StoreError otherwise."""
    if not isinstance(generation, str) or not _GENERATION.fullmatch(generation):
        raise StoreError(f"{generation!r:.80} can't name a generation: use 1 to 64 letters, digits and ._-, the first a letter or digit")
    return generation


class Strict(BaseModel):
    """A document of the store: unknown fields and loose types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MaybeEncrypted(Strict):
    """A document that says whether adapters are encrypted, and how. Without encryption it is as in format 1: the field isn't written."""

    format_version: Literal["1", "2"] = FORMAT_VERSION
    encryption: Literal["AES-256-GCM"] | None = None

    @model_validator(mode="after")
    def _version_says_it(self) -> Self:
        if (self.format_version == ENCRYPTED_FORMAT_VERSION) != (self.encryption is not None):
            raise ValueError(f"format {self.format_version} and encryption {self.encryption} don't go together")
        return self

    @model_serializer(mode="wrap")
    def _unsaid(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if name != "encryption" or value is not None}


def encrypted(is_encrypted: bool) -> dict[str, Any]:
    """The fields of a document that says so."""
    return {"format_version": ENCRYPTED_FORMAT_VERSION, "encryption": ALGORITHM} if is_encrypted else {}


class ObjectRef(Strict):
    """An object pinned by its digest; `path` counts from the store's root."""

    path: str
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class SegmentRef(ObjectRef):
    """A segment and what a reader needs to fetch its index in one request: the file's first `index_bytes` bytes."""

    wave: Annotated[int, Field(ge=0)]
    width: Annotated[int, Field(ge=1)]
    users: Annotated[int, Field(ge=1)]
    examples: Annotated[int, Field(ge=0)]
    first_key: KeyHex
    last_key: KeyHex
    index_bytes: Annotated[int, Field(ge=1)]
    index_checksum: KeyHex


class ModelRef(Strict):
    """The frozen pre-trained model that a generation belongs to."""

    name: str
    weight_hash: str


class Manifest(MaybeEncrypted):
    """A published generation. `adapter_config` and `partition` are the trainer's own; the store only keeps them.

    version       of the generation's beginning: an adapter fitted since then is newer than the one in the segments
    commit_id     of the writer that published it
    encryption    how the records of its segments are sealed; None: they aren't
    """

    generation: str
    version: str
    commit_id: KeyHex
    created_at: str
    kind: str
    width: Annotated[int, Field(ge=0)]
    model: ModelRef
    adapter_config: dict[str, Any]
    partition: dict[str, Any]
    shared: ObjectRef
    segments: list[SegmentRef]
    users: Annotated[int, Field(ge=0)]
    examples: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _sums_agree(self) -> Manifest:
        if self.users != sum(segment.users for segment in self.segments):
            raise ValueError(f"users is {self.users}, the segments hold {sum(segment.users for segment in self.segments)}")
        for before, after in zip(self.segments, self.segments[1:], strict=False):
            if before.last_key >= after.first_key:
                raise ValueError(f"waves {before.wave} and {after.wave} overlap: segments must hold disjoint, ascending ranges of keys")
        return self


class Beginning(Strict):
    """What is written first into an unfinished generation: when it began, and of which kind it is."""

    format_version: Literal["1"] = FORMAT_VERSION
    generation: str
    version: str
    kind: str


class Tombstone(Strict):
    """An erased user's tombstone: adapters up to `version` must never be served again."""

    format_version: Literal["1"] = FORMAT_VERSION
    version: str
    erased_at: str


class Current(Strict):
    """Which generation serves."""

    format_version: Literal["1"] = FORMAT_VERSION
    generation: str


class StoreIdentity(MaybeEncrypted):
    """The store's own record. `key_hex` keys the user hash; null when the operator keeps the key outside the store.

    With `encryption` every adapter in the store is sealed; that is fixed when the store is made.
    """

    store_id: KeyHex
    key_hex: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    key_check: KeyHex


def dump_json(model: BaseModel) -> bytes:
    """The document's bytes, for people to read as well. Its last field is a checksum of all others."""
    values = model.model_dump(mode="json")
    return json.dumps({**values, "checksum": _checksum(values)}, indent=1, ensure_ascii=False).encode() + b"\n"


def load_json(kind: type[_Model], data: bytes, name: str) -> _Model:
    """Parse strictly. Raises CorruptObjectError naming `name` and the first wrong field.

    A document from before there were checksums is read without one.
    """
    what = f"{name} isn't a valid {kind.__name__.lower()}"
    try:
        values = json.loads(data)
        if not isinstance(values, dict):
            raise CorruptObjectError(f"{what}: it holds no object")
        checksum = values.pop("checksum", None)
        if checksum is not None and checksum != _checksum(values):
            raise CorruptObjectError(f"{what}: it doesn't match its checksum; restore it")
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise CorruptObjectError(f"{what}: {first_problem(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptObjectError(f"{what}: {' '.join(str(error).split())}") from error


def _checksum(values: dict[str, Any]) -> str:
    """BLAKE2b, 16 bytes, of the values as JSON with sorted keys, no spaces and ASCII only."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def first_problem(error: ValidationError) -> str:
    """The first wrong field and what is wrong with it, in one line and without its value."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
