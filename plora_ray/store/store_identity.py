"""Who a store is: its id, and the key with which user ids are hashed into object names.

Knows store.json and PLORA_STORE_KEY. A key from outside is never written; only a check value is, so that a wrong key is refused
instead of quietly naming every user differently.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import uuid

from plora_ray.errors import StoreError
from plora_ray.store import names
from plora_ray.store.manifest import StoreIdentity, dump_json, encrypted, load_json
from plora_ray.store.object_errors import ObjectExists, ObjectNotFound
from plora_ray.store.objects import ObjectStore

KEY_VARIABLE = "PLORA_STORE_KEY"
MIN_SECRET_BYTES = 16
MAX_SECRET_BYTES = 64  # BLAKE2b's limit for a key


def open_identity(objects: ObjectStore, secret: bytes | None, create: bool, encrypt: bool) -> tuple[StoreIdentity, bytes]:
    """The store's record and the key of its user hash; a missing store is made if `create`. Raises StoreError as AdapterStore does.

    encrypt: whether a store that is made here encrypts what it holds of users.
    """
    outside = _outside_secret(secret)
    try:
        identity = _read(objects)
    except ObjectNotFound as error:
        if not create:
            raise StoreError(f"there is no adapter store at {objects.uri}: train one first or correct the URI") from error
        identity = _create(objects, outside or secrets.token_bytes(32), inside=outside is None, encrypt=encrypt)
    return identity, _key(objects, identity, outside)


def make_like(objects: ObjectStore, other: ObjectStore, key: bytes, encrypt: bool) -> StoreIdentity:
    """The identity of the store at `objects`, made if it is missing: with an id of its own, and `key`, that of `other`, kept as there."""
    try:
        return _read(objects)
    except ObjectNotFound:
        return _create(objects, key, inside=_read(other).key_hex is not None, encrypt=encrypt)


def _read(objects: ObjectStore) -> StoreIdentity:
    return load_json(StoreIdentity, objects.read(names.IDENTITY), objects.uri_of(names.IDENTITY))


def _create(objects: ObjectStore, key: bytes, *, inside: bool, encrypt: bool) -> StoreIdentity:
    """A new store's identity. inside: whether its key is kept in it."""
    objects.probe()
    store_id = uuid.uuid4().hex
    kept, check_value = key.hex() if inside else None, _check_value(store_id, key)
    identity = StoreIdentity(store_id=store_id, key_hex=kept, key_check=check_value, **encrypted(encrypt))
    try:
        objects.create(names.IDENTITY, dump_json(identity))
    except ObjectExists:
        return _read(objects)  # somebody else made it a moment ago; theirs holds
    return identity


def _key(objects: ObjectStore, identity: StoreIdentity, outside: bytes | None) -> bytes:
    if outside is None and identity.key_hex is None:
        raise StoreError(f"{objects.uri} keeps its key outside: set {KEY_VARIABLE} to the one it was made with")
    key = outside if outside is not None else bytes.fromhex(identity.key_hex or "")
    if not hmac.compare_digest(_check_value(identity.store_id, key), identity.key_check):
        if identity.key_hex is not None and outside is not None:
            raise StoreError(f"{objects.uri} was made with a key of its own: unset {KEY_VARIABLE} or make another store")
        raise StoreError(f"{objects.uri} was made with another key: set {KEY_VARIABLE} to that one")
    return key


def _outside_secret(secret: bytes | None) -> bytes | None:
    if secret is None:
        text = os.environ.get(KEY_VARIABLE, "")
        if not text:
            return None
        if len(text.encode()) < MIN_SECRET_BYTES:
            raise StoreError(f"{KEY_VARIABLE} is too short: give at least {MIN_SECRET_BYTES} characters, drawn at random")
        return hashlib.blake2b(text.encode(), digest_size=32, person=b"plora-store-key").digest()
    if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        raise StoreError(f"the store's secret must have {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, got {len(secret)}")
    return secret


def _check_value(store_id: str, key: bytes) -> str:
    return hashlib.blake2b(store_id.encode(), key=key, digest_size=16, person=b"plora-check").hexdigest()
