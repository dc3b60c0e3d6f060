"""A second generation that answers for a share of the users, until it is activated or given up: the object `canary`.

Knows who is in the share; knows nothing of how generations are loaded.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from plora_ray.store import names
from plora_ray.store.manifest import dump_json, load_json
from plora_ray.store.objects import ObjectStore

FORMAT_VERSION: Final = "1"


class Canary(BaseModel):
    """share: from 0 to 1, of all users, known or not."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: Literal["1"] = FORMAT_VERSION
    generation: str
    share: Annotated[float, Field(gt=0, le=1)]

    def takes(self, key: bytes) -> bool:
        """Whether this user is in the share. Who is in a share is in every larger one; another generation meets others."""
        draw = hashlib.blake2b(key, key=self.generation.encode(), digest_size=8).digest()
        return int.from_bytes(draw, "big") < self.share * 2**64


def read_canary(objects: ObjectStore) -> Canary | None:
    """The canary as it stands; None if there is none. Raises StoreError."""
    data = objects.read_many([names.CANARY]).get(names.CANARY)
    return None if data is None else load_json(Canary, data, objects.uri_of(names.CANARY))


def write_canary(objects: ObjectStore, canary: Canary) -> None:
    """Begin a canary, or change its share. Raises StoreError."""
    objects.write(names.CANARY, dump_json(canary))


def end_canary(objects: ObjectStore) -> None:
    """All users get the current generation again. Raises StoreError."""
    objects.delete(names.CANARY)
