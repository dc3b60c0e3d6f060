"""From settings to the store they name: the one place where an AdapterStore is opened by them, so that nobody forgets its keys."""

from __future__ import annotations

from plora_ray.config import StoreSettings
from plora_ray.store import AdapterStore
from plora_ray.store.objects import SERVING_RETRY_S

UNENCRYPTED = "adapters are stored unencrypted: set store.encryption when the store is made (docs/encrypt.md)"


def open_store(settings: StoreSettings, *, create: bool = False, retry_s: float = SERVING_RETRY_S, locked: bool = False) -> AdapterStore:
    """The store, which must exist unless `create`. locked: an encrypted store may be opened without a root key. Raises StoreError."""
    options, root_key = settings.storage_options(), settings.root_key()
    return AdapterStore.open(settings.uri, options, create=create, retry_s=retry_s, encryption=root_key, locked=locked)
