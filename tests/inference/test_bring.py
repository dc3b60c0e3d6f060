"""A checkpoint brought from elsewhere is this generation's, or it is refused with nothing written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plora_ray.adapters.inject import Kind
from plora_ray.adapters.peft_export import PREFIX, peft_tensors
from plora_ray.adapters.peft_import import record_from_peft
from plora_ray.errors import DataError, ErasedDuringFit
from plora_ray.inference import bring, load_generation
from plora_ray.inference.bring import import_user
from plora_ray.inference.export import export_user
from plora_ray.store import AdapterStore
from tests.generations import publish

ADAPTER, HEAD, CONFIG = "adapter_model.safetensors", "head.safetensors", "adapter_config.json"
Change = Callable[[Path], None]


@pytest.fixture(scope="module", params=["plora", "lora"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def world(kind: Kind, tiny_plm: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[AdapterStore, Path]:
    """A store and ann's checkpoint; another one, of other shared parameters, beside it."""
    folder = tmp_path_factory.mktemp(kind)
    store = AdapterStore(str(folder / "store"))
    publish(store, tiny_plm, "g0", ["ann"], seed=1, kind=kind)
    export_user(store, "ann", folder / "other")
    publish(store, tiny_plm, "g1", ["ann", "bob"], kind=kind)
    export_user(store, "ann", folder / "ann")
    return store, folder


@pytest.fixture
def checkpoint(world: tuple[AdapterStore, Path], tmp_path: Path) -> Path:
    """A copy to change."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in (world[1] / "ann").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_checkpoint_becomes_its_users_newest_adapter_to_1e_5(world: tuple[AdapterStore, Path]) -> None:
    store, folder = world
    reader = store.open_generation()
    import_user(store, "new", folder / "ann")
    import_user(store, "bob", folder / "ann")
    original = reader.get(store.key("ann"))
    for user in ("new", "bob"):
        served = store.pull(reader, store.key(user))
        assert served is not None and original is not None and served.source == "fresh" and served.examples == 5
        np.testing.assert_allclose(served.record, original.record, atol=1e-5, rtol=0)


def test_a_user_who_is_erased_while_the_checkpoint_is_read_stays_erased(
    world: tuple[AdapterStore, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder = world
    check = bring.check_brought

    def meanwhile(*arguments: object) -> np.ndarray:
        store.erase(store.key("leaver"))
        return check(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(bring, "check_brought", meanwhile)
    with pytest.raises(ErasedDuringFit):
        import_user(store, "leaver", folder / "ann")
    assert store.get_fresh(store.key("leaver")) is None


def tensors(change: Callable[[dict[str, Tensor]], object], name: str = ADAPTER) -> Change:
    def changed(folder: Path) -> None:
        found = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
        change(found)
        save_file(found, folder / name)

    return changed


def first(found: dict[str, Tensor], ending: str = "lora_A.weight") -> str:
    return next(name for name in found if name.endswith(ending))


def config(**values: object) -> Change:
    def changed(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **values}))

    return changed


HOSTILE: dict[str, tuple[Change, str]] = {
    "no checkpoint": (lambda folder: (folder / ADAPTER).unlink(), "can't be read"),
    "a pickle": (lambda folder: (folder / ADAPTER).write_bytes(pickle.dumps({"weight": 1})), "no safetensors file"),
    "cut short": (lambda folder: (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:-1]), "no safetensors file"),
    "a header without end": (lambda folder: (folder / ADAPTER).write_bytes(b"\xff" * 64), "no safetensors file"),
    "larger than any": (lambda folder: (folder / ADAPTER).write_bytes(bytes(2**21)), "is larger than"),
    "a tensor more": (tensors(lambda found: found.update(extra=torch.zeros(1))), "'extra' is on one side only"),
    "a tensor less": (tensors(lambda found: found.pop(first(found))), "on one side only"),
    "another shape": (tensors(lambda found: found.update({first(found): torch.zeros(2, 2)})), "expected float32"),
    "another type": (tensors(lambda found: found.update({first(found): found[first(found)].double()})), "expected float32"),
    "not a number": (tensors(lambda found: found[first(found)].view(-1)[3:4].fill_(float("nan"))), "NaN or infinite"),
    "infinite": (tensors(lambda found: found[first(found, "lora_B.weight")].view(-1)[:1].fill_(float("inf"))), "NaN or infinite"),
    "another head": (tensors(lambda found: found["weight"].mul_(2), HEAD), "head.weight isn't this generation's"),
    "another rank": (config(r=5), "has r 5"),
    "another scale": (config(lora_alpha=99.0), "has lora_alpha 99.0"),
    "a scale of one layer": (config(alpha_pattern={"query": 1}), "alpha_pattern"),
    "another method": (config(peft_type="IA3"), "peft_type"),
    "DoRA": (config(use_dora=True), "use_dora"),
    "no configuration": (lambda folder: (folder / CONFIG).write_text("[1]"), "no JSON object"),
    "nested without end": (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "no JSON"),
    "a made-up count": (lambda folder: (folder / "plora.json").write_text('{"examples": -1}'), "whole number"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_checkpoint_of_the_generation_is_refused_and_nothing_is_written(
    world: tuple[AdapterStore, Path], checkpoint: Path, what: str
) -> None:
    store, (change, message) = world[0], HOSTILE[what]
    change(checkpoint)
    before = store.objects.list()
    with pytest.raises(DataError, match=message) as refused:
        import_user(store, "mallory", checkpoint)
    assert "\n" not in str(refused.value) and store.objects.list() == before


def test_an_adapter_that_lies_too_far_out_is_refused(world: tuple[AdapterStore, Path], checkpoint: Path, kind: Kind) -> None:
    shared = {name: torch.as_tensor(tensor) for name, tensor in world[0].open_generation().shared().tensors.items()}

    def leaning_farther(found: dict[str, Tensor]) -> None:
        found["bias"] = shared["head.bias"] + 1000 * (found["bias"] - shared["head.bias"])

    def farther(found: dict[str, Tensor]) -> None:
        for name in found:
            if kind == "lora" and name.endswith("lora_B.weight"):
                found[name] *= 1000
            elif name.endswith("lora_B.bias"):
                layer = name.removeprefix(PREFIX).removesuffix(".lora_B.bias")
                everybodys = shared[f"layers.{layer}.B"] @ shared[f"layers.{layer}.q"]
                found[name] = everybodys + 1000 * (found[name] - everybodys)

    tensors(farther)(checkpoint)
    tensors(leaning_farther, HEAD)(checkpoint)
    with pytest.raises(DataError, match="times as far out as users do"):
        import_user(world[0], "mallory", checkpoint)


def test_a_user_whom_the_guard_left_to_the_population_comes_back_as_the_population(tiny_plm: str, tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g0", ["ann"])
    loaded = load_generation(store, fold=False)
    shared = loaded.model.shared_parameters()
    assert any(bool(parameter.any()) for name, parameter in shared.items() if name.endswith(".q"))
    nobody = torch.zeros(loaded.model.user_width)
    checkpoint = peft_tensors(loaded.model, nobody)
    assert torch.equal(record_from_peft(loaded.model, checkpoint, None), nobody)
    near = nobody.clone()
    near[0] = 1e-3
    torch.testing.assert_close(record_from_peft(loaded.model, peft_tensors(loaded.model, near), None), near, atol=1e-5, rtol=0)


def test_a_checkpoint_of_other_shared_parameters_is_refused(world: tuple[AdapterStore, Path]) -> None:
    with pytest.raises(DataError, match="isn't this generation's"):
        import_user(world[0], "mallory", world[1] / "other")


def test_biases_that_no_vector_explains_are_refused(world: tuple[AdapterStore, Path], checkpoint: Path, kind: Kind) -> None:
    if kind == "lora":
        tensors(lambda found: found.update({first(found).replace("lora_A.weight", "lora_B.bias"): torch.zeros(4)}))(checkpoint)
        message = "on one side only"  # private matrices have no biases
    else:
        tensors(lambda found: found[first(found, "lora_B.bias")].add_(1.0))(checkpoint)
        message = "no user vector of this generation explains"
    with pytest.raises(DataError, match=message):
        import_user(world[0], "mallory", checkpoint)


def test_a_head_that_hears_the_user_tells_of_the_vector_and_must_be_that_vectors(tiny_plm: str, tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path / "store"))
    vectors = publish(store, tiny_plm, "g1", ["ann"], head_terms="taste")
    export_user(store, "ann", tmp_path / "ann")
    import_user(store, "new", tmp_path / "ann")
    served = store.pull(store.open_generation(), store.key("new"))
    assert served is not None
    np.testing.assert_allclose(served.record, vectors["ann"], atol=1e-4, rtol=0)
    tensors(lambda found: found["bias"].add_(1.0), HEAD)(tmp_path / "ann")
    with pytest.raises(DataError, match="this generation"):
        import_user(store, "mallory", tmp_path / "ann")
