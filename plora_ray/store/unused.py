"""Adapters that nobody has used for so many days: who has them, and taking them away without a trace that the user was erased.

Used is who was served, fitted, or given a fresh adapter. A user whose adapter goes comes back by the next training or the next examples.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass, field

from plora_ray.identity import as_words
from plora_ray.store import names
from plora_ray.store.adapter_store import AdapterStore
from plora_ray.store.adapters import decode_fresh, encode_erased
from plora_ray.store.uses import begin_uses, read_uses, today, uses_since


@dataclass(frozen=True)
class Unused:
    """keys: of the users. since_s: adapters fitted from this moment on are used, Unix time. not_yet: why nobody can be told, if so."""

    keys: frozenset[bytes] = field(default_factory=frozenset)
    since_s: float = 0.0
    not_yet: str | None = None


def unused_users(store: AdapterStore, days: int, *, dry_run: bool = False) -> Unused:
    """The users of the current generation, and of fresh adapters, who weren't used for `days` whole days.

    Nobody, before uses were written down for so long; the first call begins with it. Raises StoreError.
    """
    first = today() - datetime.timedelta(days=days)
    since = uses_since(store.objects)
    if since is None and not dry_run:
        begin_uses(store.objects)
    if since is None or since > first:
        begun = since or today()
        return Unused(not_yet=f"uses are written down since {begun}: unused adapters go from {begun + datetime.timedelta(days=days)} on")
    used = read_uses(store.objects, first)
    if not len(used):
        return Unused(not_yet=f"no use was written down for {days} days: set store.retention.unused_adapters_days where it serves, too")
    since_s = datetime.datetime.combine(first, datetime.time(), datetime.UTC).timestamp()
    listed = [(key, item) for item in store.objects.list(names.FRESH) if (key := names.fresh_key(item.path)) is not None]
    adapted = {key for key, item in listed if item.modified_s >= since_s}
    having = {*store.open_generation().keys(), *(key for key, _ in listed)}
    return Unused(frozenset(having - adapted - {word.tobytes() for word in as_words(used)}), since_s)


def forget_unused(store: AdapterStore, unused: Unused) -> int:
    """Take away the fresh adapters of these users, unless one was adapted meanwhile; how many went. An erasure stays noted.

    Not of users whom the current generation holds: an older adapter would serve them.
    """
    gone, reader = 0, store.open_generation()
    for key in _with_fresh(store, unused.keys):
        if reader.lookup(key) is not None:
            continue

        def emptied(data: bytes | None, key: bytes = key) -> bytes | None:
            standing = None if data is None else decode_fresh(data, store.objects.uri_of(names.fresh(key)))
            if standing is None or standing.adapter is None or _seconds(standing.adapter.version) >= unused.since_s:
                return None
            return encode_erased(key, standing.erased_version or "")

        path = names.fresh(key)
        before = store.objects.read_many([path]).get(path)
        gone += store.objects.update(path, emptied) != before
    return gone


def _with_fresh(store: AdapterStore, keys: frozenset[bytes]) -> Iterable[bytes]:
    return [key for item in store.objects.list(names.FRESH) if (key := names.fresh_key(item.path)) is not None and key in keys]


def _seconds(version: str) -> float:
    return int(version[:20]) / 1e9
