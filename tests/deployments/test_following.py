"""Following the store while answering: new generations, erasures, and what can't be loaded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deployments.engines import CurrentGeneration
from deployments.fitting import FitRequest, FitResult, FittingService
from deployments.prediction import PredictionService
from plora_ray.config import Settings, parse_settings
from plora_ray.errors import DataError, ErasedDuringFit, StoreError
from plora_ray.inference import LoadedGeneration
from plora_ray.store import AdapterStore, UserAdapter, names, new_version
from plora_ray.store.adapters import now_iso
from plora_ray.store.uses import read_uses, today
from tests.generations import DIM, publish

USERS = ["ann", "bob"]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(str(tmp_path / "store"))


@pytest.fixture
def settings(store: AdapterStore) -> Settings:
    return parse_settings({"store": {"uri": store.uri}, "serving": {"refresh_s": 3600}})  # the tests look by themselves


Following = tuple[CurrentGeneration[str], list[str], list[set[bytes]]]


@pytest.fixture
def following(store: AdapterStore, settings: Settings, tiny_plm: str) -> Iterator[Following]:
    """A follower that builds the generation's name, what it retired, and the erasures it told of."""
    publish(store, tiny_plm, "g1", USERS)
    retired: list[str] = []
    erasures: list[set[bytes]] = []

    def build(loaded: LoadedGeneration) -> str:
        return loaded.name

    current = CurrentGeneration(settings, build, retire=retired.append, on_erased=lambda built, keys: erasures.append(keys))
    yield current, retired, erasures
    current.close()


def test_a_new_generation_replaces_the_old_one_which_is_then_retired(following: Following, store: AdapterStore, tiny_plm: str) -> None:
    current, retired, _ = following
    assert current.get().current.built == "g1"
    publish(store, tiny_plm, "g2", USERS)
    current.follow()
    assert current.get().current.built == "g2" and retired == ["g1"]


def test_a_canary_is_loaded_beside_the_current_generation_and_serves_on_without_a_second_load_when_it_is_activated(
    following: Following, store: AdapterStore, tiny_plm: str
) -> None:
    current, retired, _ = following
    publish(store, tiny_plm, "g2", USERS)
    store.activate("g1")
    store.set_canary("g2", 0.25)
    current.follow()
    serving = current.get()
    assert [served.name for served in serving.all] == ["g1", "g2"] and not retired
    store.set_canary("g2", 0.5)
    current.follow()
    assert current.get().tried is serving.tried and current.get().canary == store.canary()
    store.activate("g2")
    current.follow()
    assert current.get().current is serving.tried and retired == ["g1"] and store.canary() is None
    store.activate("g1")  # a rollback is for everybody: no share stays on what was tried
    current.follow()
    assert [served.name for served in current.get().all] == ["g1"] and retired == ["g1", "g2"]


def test_a_canary_is_given_up_for_everybody_and_one_that_cannot_be_loaded_serves_nobody(
    following: Following, store: AdapterStore, tiny_plm: str
) -> None:
    current, retired, _ = following
    for name in ("g2", "g3"):
        publish(store, tiny_plm, name, USERS)
        store.activate("g1")
    store.set_canary("g2", 1.0)
    current.follow()
    assert current.get().for_users([store.key("anybody")]).name == "g2"
    store.set_canary("g2", 0)
    current.follow()
    assert retired == ["g2"] and current.get().for_users([store.key("anybody")]).name == "g1"
    store.objects.delete("generations/g3/shared.safetensors")
    store.set_canary("g3", 1.0)
    current.follow()
    assert [served.name for served in current.get().all] == ["g1"]
    for generation, share, message in (("g1", 0.5, "already"), ("g2", 1.5, "between 0"), ("g9", 0.5, "no generation g9")):
        with pytest.raises(StoreError, match=message):
            store.set_canary(generation, share)


def test_a_generation_that_cannot_be_loaded_leaves_the_old_one_serving_and_erasures_still_arrive(
    following: Following, store: AdapterStore, tiny_plm: str
) -> None:
    current, retired, erasures = following
    publish(store, tiny_plm, "g2", USERS)
    manifest = Path(store.uri.removeprefix("file://")) / "generations" / "g2" / "manifest.json"
    broken = json.loads(manifest.read_text())
    broken["adapter_config"]["spec"]["a_field_of_the_future"] = 1
    manifest.write_text(json.dumps(broken))
    store.erase(store.key("ann"))
    current.follow()
    assert current.get().current.built == "g1" and not retired
    assert erasures == [{store.key("ann")}]


def test_a_user_erased_again_after_coming_back_is_told_of_again(following: Following, store: AdapterStore) -> None:
    current, _, erasures = following
    for _ in range(2):
        store.erase(store.key("ann"))
        current.follow()
        current.follow()
    assert erasures == [{store.key("ann")}] * 2


def test_a_fit_overtaken_by_an_erasure_is_not_stored_whatever_the_clocks_say(store: AdapterStore, tiny_plm: str) -> None:
    publish(store, tiny_plm, "g1", USERS)
    reader = store.open_generation()
    key = store.key("new")
    store.erase(key)
    ahead = new_version(after="9" * 19 + "0-00000000")  # drawn by a machine whose clock is far ahead
    adapter = UserAdapter(
        key=key, record=reader.get(store.key("ann")).record, examples=1, generation="g1", version=ahead, updated_at=now_iso(),
        source="fresh", basis=reader.basis,
    )  # type: ignore[union-attr]  # fmt: skip
    with pytest.raises(ErasedDuringFit):
        store.put_fresh(adapter, known_erasure="")
    assert store.get_fresh(key) is None


def test_one_users_impossible_examples_fail_that_user_only(store: AdapterStore, settings: Settings, tiny_plm: str) -> None:
    publish(store, tiny_plm, "g1", USERS)
    service = FittingService(settings)
    good, bad = FitRequest(store.key("x"), ["a text"], ["yes"]), FitRequest(store.key("y"), ["a text"], ["of another generation"])
    fitted, failed, known = service.fit([good, bad, FitRequest(store.key("ann"), ["a text"], ["no"])])
    service.close()
    assert fitted.adapter is not None and fitted.adapter.record.shape == (DIM,) and known.adapter is not None
    assert failed.adapter is None and isinstance(failed.error, DataError)
    assert store.get_fresh(store.key("x")) is not None and store.get_fresh(store.key("y")) is None


def test_with_retention_on_a_replica_writes_down_whom_it_served_with_their_own_adapter(store: AdapterStore, tiny_plm: str) -> None:
    publish(store, tiny_plm, "g1", USERS)
    for retention, expected in (({}, set()), ({"unused_adapters_days": 30}, {store.key("ann")})):
        settings = parse_settings({"store": {"uri": store.uri, "retention": retention}, "serving": {"refresh_s": 3600}})
        service = PredictionService(settings, fit=never)
        asyncio.run(service.predict([("ann", "one text"), ("stranger", "one text"), ("ann", "another")]))
        service.close()
        assert {key.tobytes() for key in read_uses(store.objects, today())} == expected


def test_with_retention_on_a_users_earlier_examples_are_fitted_with_the_new_ones(store: AdapterStore, tiny_plm: str) -> None:
    publish(store, tiny_plm, "g1", USERS)
    retention = {"examples_days": 30, "allow_plain": True}
    service = FittingService(parse_settings({"store": {"uri": store.uri, "retention": retention}, "serving": {"refresh_s": 3600}}))
    plain = FittingService(parse_settings({"store": {"uri": store.uri}, "serving": {"refresh_s": 3600}}))
    first, second = FitRequest(store.key("new"), ["one", "two"], ["yes", "no"]), FitRequest(store.key("new"), ["three"], ["yes"])
    service.fit([first])
    found = service.fit([second])[0].adapter
    together = plain.fit([FitRequest(store.key("other"), ["one", "two", "three"], ["yes", "no", "yes"])])[0].adapter
    for fitting in (service, plain):
        fitting.close()
    assert found is not None and together is not None and found.examples == 3
    np.testing.assert_allclose(found.record, together.record, atol=1e-6)
    assert [names.examples_key(item.path) for item in store.objects.list(names.EXAMPLES)] == [store.key("new")]


async def never(request: FitRequest) -> FitResult:
    raise AssertionError("nobody is fitted here")
