"""From settings to the store they name, and to its root key: the one place where both meet, so that nobody forgets the keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from plora_ray.config import StoreSettings, parse_settings
from plora_ray.errors import ConfigError
from plora_ray.store import AdapterStore, RootKeySource
from plora_ray.store.encryption.ring import rotate_root
from plora_ray.store.encryption.user_keys import UserKeys
from plora_ray.store.objects import SERVING_RETRY_S

UNENCRYPTED = "adapters are stored unencrypted: set store.encryption when the store is made (docs/encrypt.md)"


def open_store(settings: StoreSettings, *, create: bool = False, retry_s: float = SERVING_RETRY_S, locked: bool = False) -> AdapterStore:
    """The store, which must exist unless `create`. locked: an encrypted store may be opened without a root key. Raises StoreError."""
    options, root_key = settings.storage_options(), settings.root_key()
    return AdapterStore.open(settings.uri, options, create=create, retry_s=retry_s, encryption=root_key, locked=locked)


def other_root_key(settings: StoreSettings, key_file: Path | None, key_env: str | None, kms_key_id: str | None) -> RootKeySource | None:
    """The root key that a command's options name; None if they name none. Raises ConfigError if they name several."""
    given = {"key_file": key_file, "key_env": key_env, "kms_key_id": kms_key_id}
    if not any(given.values()):
        return None
    return parse_settings({"store": {"encryption": given, "region": settings.region}}).store.root_key()


def rotate_root_key(settings: StoreSettings, new: RootKeySource | None, rewrap: bool, on_shards: Callable[[int, int], None]) -> int:
    """Give the store the root key `new` (None: leave it), and with `rewrap` wrap all data keys by the ring's newest key.

    Returns the version of that. on_shards: hears how many key shards of how many are done. Raises ConfigError, StoreError.
    """
    old = settings.root_key()
    if old is None or (new is None and not rewrap):
        raise ConfigError("set store.encryption to the root key of now, and give the new one: --key-file, --key-env or --kms-key-id")
    store = open_store(settings)
    if new is not None:
        rotate_root(store.objects, store.store_id, old, new)
    keys = UserKeys(store.objects, store.store_id, new or old)
    if rewrap:
        keys.rewrap(on_shards)
    return keys.newest
