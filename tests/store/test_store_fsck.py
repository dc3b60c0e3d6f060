"""The check of a whole store: silent about a sound one, loud about a changed bit of any object, and it changes nothing itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plora_ray.store import AdapterStore, names
from plora_ray.store.fsck import Checked, check
from plora_ray.store.manifest import Current, dump_json, load_json

Make = Callable[..., Any]


def checked(store: AdapterStore) -> Checked:
    return check(store, lambda objects, total: None)


@pytest.fixture
def kept(store: AdapterStore, make_users: Make, make_fresh: Make, publish: Make) -> AdapterStore:
    """A store with every kind of object in it."""
    publish("g1", make_users(7))
    publish("g2", make_users(9), shared_value=2.0)
    store.put_fresh(make_fresh("user-1"))
    store.erase(store.key("user-2"))
    unfinished = store.begin("g3")
    unfinished.write_shared({"B": np.ones(2, np.float32)}, {})
    keys = np.frombuffer(store.key("user-1"), np.uint8).reshape(1, 16)
    unfinished.write_row_digests(0, keys, keys)
    unfinished.write_side_object("report.json", b"{}")
    store.objects.write("runs/0000/run.json", b"a job's own")
    return store


def test_a_sound_store_has_no_problems_and_everything_in_it_is_counted(kept: AdapterStore) -> None:
    before = {item.path: item.tag for item in kept.objects.list()}
    found = checked(kept)
    assert found.problems == [] and found.unknown == [] and found.unfinished == ["g3"]
    assert (found.generations, found.users, found.fresh, found.erased) == (2, 16, 2, 1)
    assert found.objects == len(before) - 1, "a job's own folder isn't looked at"
    assert {item.path: item.tag for item in kept.objects.list()} == before, "and nothing was written"


@pytest.mark.parametrize("place", ["file"], indirect=True)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 10**6), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_any_object_is_found_and_named(kept: AdapterStore, which: int, where: float, bit: int) -> None:
    paths = [item.path for item in kept.objects.list() if not item.path.startswith("runs/") and not item.path.endswith("report.json")]
    unproven = "generations/g3/shared.safetensors"  # its digest stands in the manifest that it doesn't have yet
    path = [path for path in paths if path != unproven][which % (len(paths) - 1)]
    file = Path(kept.uri.removeprefix("file://"), path)
    sound = file.read_bytes()
    place = int(where * len(sound))
    file.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << bit]) + sound[place + 1 :])
    try:
        assert path in {problem.path for problem in checked(kept).problems}
    finally:
        file.write_bytes(sound)


@pytest.mark.parametrize("kind", ["segments/00001.safetensors", "shared.safetensors"])
def test_a_missing_object_of_a_published_generation_is_a_problem(kept: AdapterStore, kind: str) -> None:
    kept.objects.delete(f"generations/g1/{kind}")
    assert [(problem.path, problem.what) for problem in checked(kept).problems] == [(f"generations/g1/{kind}", "is gone: restore it")]


def test_swapped_objects_are_found_although_each_is_whole(kept: AdapterStore, make_fresh: Make) -> None:
    kept.put_fresh(make_fresh("user-3"))
    paths = [names.fresh(kept.key(user)) for user in ("user-1", "user-3")]
    paths += ["generations/g1/segments/00000.safetensors", "generations/g2/segments/00000.safetensors"]
    sound = [kept.objects.read(path) for path in paths]
    for path, data in zip(paths, [sound[1], sound[0], sound[3], sound[2]], strict=True):
        kept.objects.write(path, data)
    assert {problem.path for problem in checked(kept).problems} == set(paths)


def test_what_belongs_to_nobody_is_named_and_left_alone(kept: AdapterStore) -> None:
    strange = ["generations/g1/segments/00009.safetensors", "somebody/else.txt", "users/zz/what.safetensors"]
    for path in strange:
        kept.objects.write(path, b"x")
    found = checked(kept)
    assert found.problems == [] and found.unknown == strange and all(kept.objects.exists(path) for path in strange)


def test_a_current_generation_that_is_not_published_is_a_problem(kept: AdapterStore) -> None:
    kept.objects.write(names.CURRENT, dump_json(Current(generation="g3")))
    assert [problem.path for problem in checked(kept).problems] == [names.CURRENT]


def test_documents_from_before_there_were_checksums_are_read_and_succeeded(kept: AdapterStore) -> None:
    for path in (names.CURRENT, names.manifest("g1"), names.manifest("g2"), names.tombstone(kept.key("user-2")), names.IDENTITY):
        values = json.loads(kept.objects.read(path))
        assert len(values.pop("checksum")) == 32
        kept.objects.write(path, json.dumps(values).encode())
    assert checked(kept).problems == [] and kept.current() == "g2"
    assert kept.succeed("g2", "g1") and kept.current() == "g1"
    assert load_json(Current, kept.objects.read(names.CURRENT), "current").generation == "g1"
