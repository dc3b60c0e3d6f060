"""The formats: bit-exact, and no byte can change unnoticed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import hypothesis.extra.numpy as numpy_strategies
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.store import UserAdapter, new_version
from plora_ray.store.adapters import decode_fresh, encode_erased, encode_fresh, now_iso
from plora_ray.store.manifest import Current, Manifest, ModelRef, ObjectRef, dump_json, load_json
from plora_ray.store.segments import decode_index, decode_segment, encode_segment, parse_segment_header
from plora_ray.store.shared import decode_shared, encode_shared

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def segments(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    keys = sorted(draw(st.sets(st.binary(min_size=16, max_size=16), min_size=1, max_size=12)))
    width = draw(st.integers(1, 7))
    records = draw(numpy_strategies.arrays(np.float32, (len(keys), width), elements=finite))
    examples = draw(numpy_strategies.arrays(np.int64, len(keys), elements=st.integers(0, 2**31 - 1)))
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16), records, examples


def encoded(parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> bytes:
    return encode_segment(*parts, kind="plora", generation="g1", wave=3)


def small_segment() -> bytes:
    keys = np.arange(32, dtype=np.uint8).reshape(2, 16)
    return encoded((keys, np.arange(6, dtype=np.float32).reshape(2, 3), np.array([5, 6])))


def fresh_adapter(record: np.ndarray) -> UserAdapter:
    return UserAdapter(b"k" * 16, record, 3, "g1", new_version(), now_iso(), "fresh", "ab" * 32)


@settings(max_examples=40, deadline=None)
@given(segments())
def test_a_segment_reads_back_bit_exact(parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    data = encoded(parts)
    segment = decode_segment(data, "segment")
    keys, records, examples = parts
    assert segment.keys.tobytes() == keys.tobytes() and segment.records.tobytes() == records.tobytes()
    assert segment.examples.tolist() == examples.tolist()
    assert (segment.layout.kind, segment.layout.generation, segment.layout.wave) == ("plora", "g1", 3)
    assert segment.layout == decode_index(data[: segment.layout.records_at], "segment").layout
    assert encoded(parts) == data


@settings(max_examples=150, deadline=None)
@given(segments(), st.data())
def test_any_changed_byte_of_a_segment_is_detected(parts: tuple[np.ndarray, np.ndarray, np.ndarray], data: st.DataObject) -> None:
    good = bytearray(encoded(parts))
    position = data.draw(st.integers(0, len(good) - 1))
    good[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptObjectError):
        decode_segment(bytes(good), "segment")


@settings(max_examples=60, deadline=None)
@given(segments(), st.data())
def test_a_segment_of_any_other_length_is_detected(parts: tuple[np.ndarray, np.ndarray, np.ndarray], data: st.DataObject) -> None:
    good = encoded(parts)
    cut = data.draw(st.integers(0, len(good) - 1))
    for bad in (good[:cut], good + b"\0" * (cut + 1)):
        with pytest.raises(CorruptObjectError):
            decode_segment(bad, "segment")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_no_segment(noise: bytes, with_length: bool) -> None:
    data = len(noise).to_bytes(8, "little") + noise if with_length else noise
    with pytest.raises(CorruptObjectError):
        decode_segment(data, "segment")


def test_a_record_moved_to_another_user_is_detected() -> None:
    data = bytearray(small_segment())
    at = decode_segment(bytes(data), "segment").layout.records_at
    data[at : at + 12], data[at + 12 : at + 24] = data[at + 12 : at + 24], data[at : at + 12]
    with pytest.raises(CorruptObjectError, match="doesn't match its user's digest"):
        decode_segment(bytes(data), "segment")


def with_header(change: str) -> bytes:
    data = small_segment()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header, separators=(",", ":"))
    if change == "duplicate key":
        text = text[:-1] + ',"keys":' + json.dumps(header["keys"]) + "}"
    elif change == "unknown tensor":
        text = text[:-1] + ',"more":{"dtype":"U8","shape":[0],"data_offsets":[128,128]}}'
    elif change == "overlap":
        text = text.replace('"data_offsets":[32,64]', '"data_offsets":[0,32]')
    elif change == "dtype":
        text = text.replace('"F32"', '"I32"')
    elif change == "shape":
        text = text.replace('"shape":[2,3]', '"shape":[3,2]')
    elif change == "deep":
        text = "[" * 100_000
    elif change == "large":
        text += " " * 2**20
    assert change == "none" or text != json.dumps(header, separators=(",", ":"))
    text += " " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text.encode() + data[8 + length :]


def test_an_unchanged_header_passes() -> None:
    parse_segment_header(with_header("none"), "segment")


@pytest.mark.parametrize("change", ["duplicate key", "unknown tensor", "overlap", "dtype", "shape", "deep", "large"])
def test_a_header_that_says_anything_else_is_refused(change: str) -> None:
    with pytest.raises(CorruptObjectError):
        parse_segment_header(with_header(change), "segment")


def test_safetensors_reads_a_segment_and_a_row_of_it_is_a_user(tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").write_bytes(small_segment())
    with safe_open(tmp_path / "s.safetensors", "np") as file:
        assert set(file.keys()) == {"keys", "records", "examples", "digests"}
        assert file.metadata()["format_version"] == "1" and file.metadata()["wave"] == "3"
        assert file.get_slice("records")[1].tolist() == [3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("keys", "records", "examples", "reason"),
    [
        (np.zeros((2, 16), np.uint8), np.zeros((2, 3), np.float32), np.ones(2, int), "ascending"),
        (np.zeros((1, 15), np.uint8), np.zeros((1, 3), np.float32), np.ones(1, int), "keys must be"),
        (np.zeros((1, 16), np.uint8), np.zeros((1, 3), np.float64), np.ones(1, int), "records must be float32"),
        (np.zeros((1, 16), np.uint8), np.zeros((2, 3), np.float32), np.ones(1, int), "records must be float32"),
        (np.zeros((1, 16), np.uint8), np.full((1, 3), np.nan, np.float32), np.ones(1, int), "NaN"),
        (np.zeros((1, 16), np.uint8), np.full((1, 3), np.inf, np.float32), np.ones(1, int), "NaN"),
        (np.zeros((1, 16), np.uint8), np.zeros((1, 3), np.float32), np.ones(1), "examples must be integers"),
        (np.zeros((1, 16), np.uint8), np.zeros((1, 3), np.float32), np.array([2**31]), "examples must lie"),
        (np.zeros((0, 16), np.uint8), np.zeros((0, 3), np.float32), np.ones(0, int), "at least one user"),
    ],
)
def test_arrays_that_make_no_segment_are_refused(keys: np.ndarray, records: np.ndarray, examples: np.ndarray, reason: str) -> None:
    with pytest.raises(StoreError, match=reason):
        encoded((keys, records, examples))


@settings(max_examples=40, deadline=None)
@given(numpy_strategies.arrays(np.float32, st.integers(1, 20), elements=finite), st.booleans())
def test_a_fresh_adapter_reads_back_bit_exact(record: np.ndarray, was_erased: bool) -> None:
    adapter = fresh_adapter(record)
    erased_version = new_version() if was_erased else None
    found = decode_fresh(encode_fresh(adapter, erased_version), "fresh")
    assert found.adapter is not None and found.erased_version == erased_version
    assert found.adapter.record.tobytes() == record.tobytes()
    assert replace(found.adapter, record=record).__dict__ == adapter.__dict__


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_changed_byte_of_a_fresh_object_is_detected(data: st.DataObject) -> None:
    good = encode_fresh(fresh_adapter(np.arange(4, dtype=np.float32)))
    bad = bytearray(data.draw(st.sampled_from([good, encode_erased(b"k" * 16, new_version())])))
    bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptObjectError):
        decode_fresh(bytes(bad), "fresh")


def test_a_later_version_sorts_later_even_after_one_of_a_faster_clock() -> None:
    ahead = "99999999999999999998-00000000"
    assert new_version() < new_version() < new_version(after=ahead) and new_version(after=ahead) > ahead


def test_shared_weights_of_every_dtype_read_back_bit_exact_and_always_as_the_same_bytes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 2).to(torch.bfloat16),
        "a": torch.randn(2, 3, dtype=torch.float64).T,
        "n": np.arange(5, dtype=np.int32),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True]),
    }
    metadata = {f"field-{number}": str(number) for number in range(20)}
    data = encode_shared(tensors, metadata)
    assert data == encode_shared(dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    shared = decode_shared(data, "shared")
    assert shared.metadata == metadata
    for name, value in tensors.items():
        assert torch.equal(shared.tensors[name], torch.as_tensor(value)) and shared.tensors[name].dtype == torch.as_tensor(value).dtype
    (tmp_path / "shared.safetensors").write_bytes(data)
    with safe_open(tmp_path / "shared.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), shared.tensors[name]) for name in tensors)


def test_shared_weights_that_diverged_are_refused() -> None:
    with pytest.raises(StoreError, match="NaN"):
        encode_shared({"B": torch.tensor([float("nan")])}, {})


def test_a_json_document_with_an_unknown_or_wrong_field_is_refused_by_name() -> None:
    assert load_json(Current, dump_json(Current(generation="g1")), "current").generation == "g1"
    with pytest.raises(CorruptObjectError, match="current isn't a valid current: extra: "):
        load_json(Current, b'{"format_version":"1","generation":"g1","extra":1}', "current")
    with pytest.raises(CorruptObjectError, match="format_version"):
        load_json(Current, b'{"format_version":"2","generation":"g1"}', "current")
    with pytest.raises(CorruptObjectError):
        load_json(Current, b"\xff{", "current")


def test_a_manifest_whose_sums_disagree_is_refused() -> None:
    fields = {
        "generation": "g",
        "version": new_version(),
        "commit_id": "0" * 32,
        "created_at": now_iso(),
        "kind": "plora",
        "width": 1,
        "adapter_config": {},
        "partition": {},
    }
    with pytest.raises(ValueError, match="users is 1, the segments hold 0"):
        Manifest(
            **fields,
            model=ModelRef(name="m", weight_hash="h"),
            shared=ObjectRef(path="p", size=1, sha256="0" * 64),
            segments=[],
            users=1,
            examples=0,
        )
