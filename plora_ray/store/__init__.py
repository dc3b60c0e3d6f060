"""Adapters in object storage (file://, s3://, memory://): immutable generations of all users' adapters in segments, fresh
adapters of single users beside them, tombstones of the erased above both. `AdapterStore` is the way in; `begin` hands out a
`GenerationWriter`, `open_generation` a `GenerationReader`. The room knows bytes and tensors, no model, no Ray and no HTTP.
"""

from plora_ray.store.adapter_store import AdapterStore, GenerationInfo
from plora_ray.store.adapters import UserAdapter, is_version, new_version
from plora_ray.store.encryption.root_key import RootKeySource
from plora_ray.store.manifest import Manifest, ModelRef, ObjectRef, SegmentRef
from plora_ray.store.objects import ObjectStore
from plora_ray.store.reader import GenerationReader
from plora_ray.store.shared import SharedWeights
from plora_ray.store.writer import GenerationWriter

__all__ = [
    "AdapterStore",
    "GenerationInfo",
    "GenerationReader",
    "GenerationWriter",
    "Manifest",
    "ModelRef",
    "ObjectRef",
    "ObjectStore",
    "RootKeySource",
    "SegmentRef",
    "SharedWeights",
    "UserAdapter",
    "is_version",
    "new_version",
]
