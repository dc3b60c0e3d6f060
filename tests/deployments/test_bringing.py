"""An adapter that was fitted on a device, so that the texts never left it, and everything else that may arrive in its place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from plora_ray.client import Client
from plora_ray.errors import CorruptObjectError
from plora_ray.inference import Examples, FewShotFitter
from plora_ray.inference.on_device import open_shared
from plora_ray.store import AdapterStore
from tests.deployments.in_process import Application, application, ask, scores
from tests.generations import DIM, publish

TEXTS, LABELS = ["lovely", "dull", "fine, I guess"], ["yes", "no", "perhaps"]


@pytest.fixture(scope="module")
def app(tiny_plm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    store = AdapterStore(str(tmp_path_factory.mktemp("bringing") / "store"))
    publish(store, tiny_plm, "g1", ["ann"])
    with application(store, tiny_plm, {"limits": {"adapter_norm": 2.0}, "give_shared": True}) as app:
        yield app


@pytest.fixture
def basis(app: Application) -> str:
    return app.service.serving.current.loaded.reader.basis


def bring(app: Application, body: bytes, user: str = "device") -> Any:
    return app.http.put(f"/v1/users/{user}/adapter", content=body, headers={"Content-Type": "application/octet-stream"})


def test_an_adapter_fitted_elsewhere_answers_as_one_fitted_here_from_the_same_examples(app: Application, basis: str) -> None:
    examples = {"examples": [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]}
    assert app.http.put("/v1/users/here/examples", json=examples).status_code == 200
    client = Client("http://testserver")
    client._http = app.http  # the same calls, into this process
    on_device = open_shared(*client.shared("device"))
    assert list(on_device.reader.keys()) == [] and on_device.reader.basis == basis
    fit = FewShotFitter(on_device).fit_many([Examples(TEXTS, LABELS)])[0]
    assert client.put_adapter("device", fit.vector, basis) == {"user_id": "device", "generation": "g1"}
    assert client.predict([("device", "so so")])[0]["personalization"] == "adapter"
    assert np.allclose(scores(ask(app, [("device", "so so")])), scores(ask(app, [("here", "so so")])), atol=1e-6)
    assert scores(ask(app, [("device", "so so")])) != scores(ask(app, [("nobody", "so so")]))
    assert client.user("device")["examples"] == 0


def test_shared_parameters_are_handed_out_only_where_the_operator_says_so_and_a_damaged_copy_is_noticed(
    app: Application, tiny_plm: str, tmp_path: Path
) -> None:
    client = Client("http://testserver")
    client._http = app.http
    description, shared = client.shared("device")
    with pytest.raises(CorruptObjectError, match="fetch them again"):
        open_shared(description, shared[:-1] + b"?")
    assert app.http.get("/v1/generations/g9/shared").status_code == app.http.get("/v1/generations/..%2Fg1/shared").status_code == 404
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g1", ["ann"])
    with application(store, tiny_plm, {}) as closed:
        assert closed.http.get("/v1/shared/device").status_code == closed.http.get("/v1/generations/g1/shared").status_code == 403


def body(basis: str, **changes: Any) -> bytes:
    tensors = {"record": np.zeros(DIM, np.float32), **changes}
    return save({name: value for name, value in tensors.items() if value is not None}, {"basis": basis})


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (np.zeros(DIM + 1, np.float32), r"\[9\]"),
        (np.zeros((1, DIM), np.float32), "one tensor"),
        (np.zeros(DIM, np.float64), "F32"),
        (np.zeros(DIM, np.int32), "F32"),
        (np.full(DIM, np.nan, np.float32), "NaN"),
        (np.full(DIM, np.inf, np.float32), "NaN or infinite"),
        (np.full(DIM, 3e38, np.float32), "further"),
        (np.full(DIM, 2.01, np.float32), "further"),
        (None, "one tensor"),
    ],
)
def test_a_record_that_cannot_be_an_adapter_is_named_and_not_stored(
    app: Application, basis: str, record: np.ndarray | None, why: str
) -> None:
    answer = bring(app, body(basis, record=record), "hostile")
    assert answer.status_code == 422 and re.search(why, answer.json()["detail"])
    assert app.http.get("/v1/users/hostile").status_code == 404


def test_a_body_that_is_no_strict_tensor_file_is_refused(app: Application, basis: str) -> None:
    good = body(basis)
    header = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])

    def file(text: str) -> bytes:
        return len(text).to_bytes(8, "little") + text.encode() + bytes(4 * DIM)

    repeated = json.dumps(header)[:-1] + ', "record": ' + json.dumps(header["record"]) + "}"
    overlapping = {**header, "record": {**header["record"], "data_offsets": [0, 4 * DIM - 4]}}
    hostile = [
        b"",
        b"\x80\x04K\x01.",  # a pickle
        good[:-1],
        good + b"\0",
        (2**62).to_bytes(8, "little") + good[8:],
        file(repeated),
        file(json.dumps(overlapping)),
        body(basis, more=np.zeros(1, np.float32)),
        save({"record": np.zeros(DIM, np.float32)}),
        save({"record": np.zeros(DIM, np.float32)}, {"basis": "latest"}),
    ]
    assert {bring(app, data, "hostile").status_code for data in hostile} == {422}
    assert bring(app, body("0" * 64), "hostile").status_code == 409
    assert bring(app, bytes(3_000_000), "hostile").status_code == 413
    assert app.http.get("/v1/users/hostile").status_code == 404 and bring(app, good, "honest").status_code == 200


def test_a_brought_adapter_goes_when_its_user_is_erased(app: Application, basis: str) -> None:
    assert bring(app, body(basis), "leaver").status_code == 200
    assert app.http.delete("/v1/users/leaver").status_code == 204
    assert ask(app, [("leaver", "x")]).json()["predictions"][0]["personalization"] == "population"


def test_private_matrices_are_brought_within_their_own_bound(tiny_plm: str, tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g1", ["ann"], kind="lora")
    with application(store, tiny_plm, {"limits": {"adapter_norm": 0.5}}) as app:
        loaded = app.service.serving.current.loaded
        population = loaded.model.population_vector().numpy()
        near, far = population * 1.4, population * 1.6
        assert bring(app, body(loaded.reader.basis, record=near)).status_code == 200
        assert bring(app, body(loaded.reader.basis, record=far)).status_code == 422
