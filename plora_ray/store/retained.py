"""Users' examples that are kept so that their adapters can be fitted again: examples/{xx}/{key}.safetensors, one object a user.

`key` uint8 [16] and `examples` uint8 [bytes], JSON: texts, labels and, for each, when it came (Unix time). Metadata: `format_version`,
`count`, `erased_version` (of the user's last erasure that the writer knew of) and `checksum` over all of it. Whoever seals what is
one user's gives a `Seal`, which wraps the JSON. Knows nothing of what texts and labels mean.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from plora_ray.errors import CorruptObjectError, ErasedDuringFit
from plora_ray.identity import KEY_BYTES
from plora_ray.store import names
from plora_ray.store.objects import ObjectStore
from plora_ray.store.tensorfile import TensorSpec, encode, parse_header
from plora_ray.store.tombstones import tombstone_version

FORMAT_VERSION = "1"
MOST_EXAMPLES = 1024  # of one user; older ones go
_METADATA = {"format_version", "count", "erased_version"}


class Seal(Protocol):
    """What wraps one user's bytes and gives them back. opened raises CorruptObjectError naming `name`."""

    def sealed(self, key: bytes, plain: bytes) -> bytes: ...
    def opened(self, key: bytes, sealed: bytes, name: str) -> bytes: ...


class Plain:
    """No seal: bytes lie as they are."""

    def sealed(self, key: bytes, plain: bytes) -> bytes:
        return plain

    def opened(self, key: bytes, sealed: bytes, name: str) -> bytes:
        return sealed


@dataclass(frozen=True)
class Retained:
    """One user's examples, oldest first. labels: as data files give them. came_s: Unix times."""

    texts: list[str] = field(default_factory=list)
    labels: list[str | float] = field(default_factory=list)
    came_s: list[float] = field(default_factory=list)

    def after(self, time_s: float) -> Retained:
        """Those that came at `time_s` or later."""
        places = [place for place, came in enumerate(self.came_s) if came >= time_s]
        return Retained(*([values[place] for place in places] for values in (self.texts, self.labels, self.came_s)))  # type: ignore[arg-type]

    def joined(self, texts: Sequence[str], labels: Sequence[str | float], came_s: float) -> Retained:
        """With new ones, of which one replaces an older one of the same text; older ones only up to MOST_EXAMPLES in all."""
        new = set(texts)
        old = [row for row in zip(self.texts, self.labels, self.came_s, strict=True) if row[0] not in new]
        room = max(0, MOST_EXAMPLES - len(texts))
        rows = [*old[max(0, len(old) - room) :], *zip(texts, labels, [came_s] * len(texts), strict=True)]
        return Retained([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


class RetainedExamples:
    """The retained examples of a store's users, each for `days` days."""

    def __init__(self, objects: ObjectStore, days: int, seal: Seal | None = None) -> None:
        self._objects, self._kept_s, self._seal = objects, days * 86_400.0, seal or Plain()

    def keep(self, key: bytes, texts: Sequence[str], labels: Sequence[str | float], known_erasure: str = "") -> None:
        """Keep a user's new examples beside the older ones. known_erasure: version of the last erasure known when they came, "" for none.

        Raises ErasedDuringFit, with nothing kept, if the user was erased since.
        """
        path, now_s = names.examples(key), time.time()

        def newest(data: bytes | None) -> bytes:
            return self._encode(key, self._valid(key, data, known_erasure).joined(texts, labels, now_s), known_erasure)

        self._refuse_erased(key, known_erasure)
        self._objects.update(path, newest)
        try:
            self._refuse_erased(key, known_erasure)
        except ErasedDuringFit:
            self._objects.delete(path)
            raise

    def of(self, key: bytes, known_erasure: str = "") -> Retained:
        """A user's examples that are young enough and came after the erasure `known_erasure`. Raises CorruptObjectError."""
        path = names.examples(key)
        return self._valid(key, self._objects.read_many([path]).get(path), known_erasure)

    def keys(self) -> Iterator[bytes]:
        """All users with an object here, ascending."""
        return (key for item in self._objects.list(names.EXAMPLES) if (key := names.examples_key(item.path)) is not None)

    def expire(self) -> int:
        """Delete what is too old or an erased user's; how many objects were changed. Stopped and called again it goes on."""
        changed = 0
        for key in list(self.keys()):
            path = names.examples(key)
            before = self._objects.read_many([path]).get(path)
            if before is None:
                continue
            erased, known = tombstone_version(self._objects, key) or "", _metadata(before, self._objects.uri_of(path))["erased_version"]
            kept = Retained() if erased != known else self._valid(key, before, known)
            if not kept.texts:
                self._objects.delete(path)  # one that came this moment is lost; its adapter isn't
                changed += 1
            elif len(kept.texts) < int(_metadata(before, self._objects.uri_of(path))["count"]):
                changed += self._objects.update(path, partial(self._younger, key, known)) != before
        return changed

    def _younger(self, key: bytes, known: str, data: bytes | None) -> bytes | None:
        return None if data is None else self._encode(key, self._valid(key, data, known), known)

    def _valid(self, key: bytes, data: bytes | None, known_erasure: str) -> Retained:
        """What may be used of an object: nothing of before an erasure, nothing too old."""
        if data is None:
            return Retained()
        name = self._objects.uri_of(names.examples(key))
        if _metadata(data, name)["erased_version"] != known_erasure:
            return Retained()
        stored_key, body = decode_examples(data, name)
        if stored_key != key:
            raise CorruptObjectError(f"{name} holds another user's examples: delete it")
        try:
            return Retained(**json.loads(self._seal.opened(key, body, name))).after(time.time() - self._kept_s)
        except (ValueError, TypeError):
            raise CorruptObjectError(f"{name} holds no examples: delete it") from None

    def _encode(self, key: bytes, kept: Retained, known_erasure: str) -> bytes:
        body = self._seal.sealed(key, json.dumps(vars(kept), ensure_ascii=False).encode())
        metadata = {"format_version": FORMAT_VERSION, "count": str(len(kept.texts)), "erased_version": known_erasure}
        tensors = [(TensorSpec("key", "U8", (KEY_BYTES,)), key), (TensorSpec("examples", "U8", (len(body),)), body)]
        return encode(tensors, metadata | {"checksum": _checksum(metadata, key, body)})

    def _refuse_erased(self, key: bytes, known_erasure: str) -> None:
        if (tombstone_version(self._objects, key) or "") != known_erasure:
            raise ErasedDuringFit("the user was erased after these examples came; they aren't kept")


def forget_examples(objects: ObjectStore, key: bytes) -> None:
    """Delete a user's examples, if there are any."""
    objects.delete(names.examples(key))


def count_examples(objects: ObjectStore, key: bytes) -> int:
    """How many examples of the user the store holds, whatever their age."""
    path = names.examples(key)
    data = objects.read_many([path]).get(path)
    return 0 if data is None else int(_metadata(data, objects.uri_of(path))["count"])


def decode_examples(data: bytes, name: str) -> tuple[bytes, bytes]:
    """(key, sealed examples), checksum verified. Raises CorruptObjectError naming `name`."""
    layout = parse_header(data, name)
    size = layout.tensors[-1].nbytes if layout.tensors else 0
    if layout.tensors != (TensorSpec("key", "U8", (KEY_BYTES,)), TensorSpec("examples", "U8", (size,))):
        raise CorruptObjectError(f"{name} doesn't hold a user's examples")
    key, body, metadata = data[layout.slice("key")], data[layout.slice("examples")], dict(layout.metadata)
    checksum = metadata.pop("checksum", "")
    if set(metadata) != _METADATA or metadata["format_version"] != FORMAT_VERSION or _checksum(metadata, key, body) != checksum:
        raise CorruptObjectError(f"{name} doesn't hold a user's examples in format {FORMAT_VERSION}")
    return key, body


def _metadata(data: bytes, name: str) -> dict[str, str]:
    decode_examples(data, name)
    return parse_header(data, name).metadata


def _checksum(metadata: dict[str, str], key: bytes, body: bytes) -> str:
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    digest.update(key)
    digest.update(body)
    return digest.hexdigest()
