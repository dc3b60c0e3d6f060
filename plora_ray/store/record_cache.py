"""What may stand between a reader and the store: stored bytes of single records, kept nearer. Knows nothing of where."""

from __future__ import annotations

from typing import Protocol


class RecordCache(Protocol):
    """Stored bytes of single records, kept nearer than the store. What it gives is proven like what the store gives."""

    def get(self, key: bytes) -> bytes | None: ...
    def put(self, key: bytes, stored: bytes) -> None: ...
    def drop(self, key: bytes) -> None: ...
