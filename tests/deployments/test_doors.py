"""What a request passes before anything is done for it, and what it leaves in the audit log."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from deployments.prediction import PredictionService
from deployments.problems import Problem
from deployments.rates import Rates
from deployments.routes import create_api
from plora_ray.config import parse_settings
from plora_ray.errors import ConfigError
from plora_ray.store import AdapterStore
from tests.deployments.in_process import KEY, Application, application, ask, bearer, scores
from tests.generations import publish

EXAMPLES = {"examples": [{"text": "lovely", "label": "yes"}, {"text": "dull", "label": "no"}]}


@pytest.fixture(scope="module")
def store(tiny_plm: str, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    store = AdapterStore(str(tmp_path_factory.mktemp("doors") / "store"))
    publish(store, tiny_plm, "g1", ["ann", "bob"])
    return store


@pytest.fixture(scope="module")
def auth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file: Path = tmp_path_factory.mktemp("keys") / "key"
    file.write_text(KEY)
    return {"algorithm": "HS256", "key_file": str(file)}


@pytest.fixture
def audit_file(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def app(store: AdapterStore, tiny_plm: str, auth: dict[str, Any], audit_file: Path) -> Iterator[Application]:
    limits = {"requests_per_minute": 0.5, "requests_burst": 8, "adaptations_per_minute": 2}
    with application(store, tiny_plm, {"auth": auth, "limits": limits, "audit": {"file": str(audit_file)}}) as app:
        yield app


def test_without_rights_a_request_reaches_no_service_and_so_no_cache(auth: dict[str, Any]) -> None:
    def service() -> PredictionService:
        raise AssertionError("the service was asked")

    http = TestClient(create_api(parse_settings({"serving": {"auth": auth}}).serving, service))
    body = {"inputs": [{"user_id": "ann", "text": "x"}]}
    tensors = [{"name": name, "datatype": "BYTES", "shape": [1], "data": ["ann"]} for name in ("text", "user_id")]
    for headers, status in (({}, 401), (bearer("predict", "bob"), 403), (bearer("adapt erase admin", "ann"), 403)):
        assert http.post("/v1/predict", json=body, headers=headers).status_code == status
        assert http.get("/v1/users/ann", headers=headers).status_code == status
        assert http.post("/v2/models/plora/infer", json={"inputs": tensors}, headers=headers).status_code == status


def test_a_caller_who_asks_too_often_is_told_when_to_come_back_while_others_and_operators_are_served(app: Application) -> None:
    mine, other = bearer("predict admin", "ann"), bearer("predict", "bob")
    statuses = [ask(app, [("ann", "x")], mine).status_code for _ in range(9)]
    assert statuses == [200] * 8 + [429]
    refused = app.http.get("/v1/users/ann", headers=mine)
    assert refused.status_code == 429 and 60 < int(refused.headers["Retry-After"]) <= 120  # half a token a minute
    assert ask(app, [("bob", "x")], other).status_code == 200
    assert app.http.get("/v1/generations", headers=mine).status_code == app.http.get("/readyz", headers=mine).status_code == 200


def test_a_bucket_fills_up_at_its_rate_to_its_burst_and_no_further() -> None:
    now = 0.0
    rates = Rates(60, 2, lambda: now)

    def passes(name: str = "a") -> bool:
        try:
            rates.spend(name, "calls")
        except Problem as problem:
            assert problem.status == 429 and problem.headers["Retry-After"] == "1"
            return False
        return True

    assert [passes() for _ in range(3)] == [True, True, False] and passes("b")
    now = 1.0
    assert [passes() for _ in range(2)] == [True, False]
    now = 1000.0
    assert [passes() for _ in range(3)] == [True, True, False]


def test_one_user_is_adapted_so_often_a_minute_and_no_oftener_whoever_asks(app: Application) -> None:
    put = [
        app.http.put(f"/v1/users/{user}/examples", json=EXAMPLES, headers=bearer("adapt", f"service {place}", users="*"))
        for place, user in enumerate(["eve", "eve", "eve", "fay"])
    ]
    assert [answer.status_code for answer in put] == [200, 200, 429, 200] and int(put[2].headers["Retry-After"]) <= 30


def test_a_request_past_its_callers_deadline_is_answered_503_and_its_rows_are_never_computed(store: AdapterStore, tiny_plm: str) -> None:
    with application(store, tiny_plm, {"request_timeout_s": 60}) as app, ThreadPoolExecutor(1) as thread:
        entered, go, batches = threading.Event(), threading.Event(), []

        def held(_: object, arguments: tuple[Any, ...]) -> None:
            batches.append(len(arguments[0]))
            entered.set()
            go.wait()

        app.service.serving.current.loaded.model.register_forward_pre_hook(held)
        first = thread.submit(ask, app, [("ann", "x")])
        entered.wait()
        late = ask(app, [("bob", "x"), ("bob", "y")], {"X-Request-Timeout-Seconds": "0.5"})  # long enough to be queued on a busy machine
        assert late.status_code == 503 and late.headers["Retry-After"] == "1"
        go.set()
        assert first.result().status_code == 200 and ask(app, [("ann", "z")]).status_code == 200
        assert batches == [1, 1]
        hurried = {"X-Request-Timeout-Seconds": "0.001"}
        assert app.http.put("/v1/users/ann/examples", json=EXAMPLES, headers=hurried).status_code == 503
        for bad in ("0", "-1", "nan", "inf", "soon"):
            assert ask(app, [("ann", "x")], {"X-Request-Timeout-Seconds": bad}).status_code == 422


def test_the_audit_log_names_who_did_what_to_whom_and_how_it_ended_by_keyed_hashes_only(
    app: Application, store: AdapterStore, audit_file: Path
) -> None:
    own, foreign = bearer("adapt erase", "gil"), bearer("adapt", "hal")
    app.http.put("/v1/users/gil/examples", json=EXAMPLES, headers=own)
    app.http.put("/v1/users/gil/examples", json=EXAMPLES, headers=foreign)
    app.http.put("/v1/users/gil/adapter", content=b"no adapter", headers=own)
    app.http.delete("/v1/users/gil", headers=own)
    app.http.post("/v1/generations/g1/activate", headers=bearer("admin", "operator"))
    ask(app, [("gil", "x")], bearer("predict", "gil"))
    lines = [json.loads(line) for line in audit_file.read_text().splitlines()]
    gil, hal, operator = (store.key(name).hex() for name in ("gil", "hal", "operator"))
    assert [{name: value for name, value in line.items() if name != "time"} for line in lines] == [
        {"action": "adapt", "caller": gil, "user": gil, "outcome": "done", "generation": "g1"},
        {"action": "adapt", "caller": hal, "user": gil, "outcome": "refused", "status": 403},
        {"action": "bring_adapter", "caller": gil, "user": gil, "outcome": "refused", "status": 422},
        {"action": "erase", "caller": gil, "user": gil, "outcome": "done"},
        {"action": "activate", "caller": operator, "outcome": "done", "generation": "g1"},
    ]
    assert all(datetime.datetime.fromisoformat(line["time"]).tzinfo is not None for line in lines)
    assert not any(word in audit_file.read_text() for word in ("gil", "hal", "lovely"))


def test_an_audit_log_that_cannot_be_written_and_rates_without_callers_do_not_start(tmp_path: Path) -> None:
    settings = parse_settings({"serving": {"audit": {"file": str(tmp_path / "missing" / "audit.jsonl")}}})
    with pytest.raises(ConfigError, match=r"serving\.audit\.file"):
        create_api(settings.serving, lambda: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ConfigError, match=r"set serving\.auth\.algorithm"):
        parse_settings({"serving": {"limits": {"requests_per_minute": 60}}})


def test_scores_of_one_user_are_the_same_bits_whatever_another_user_was_poisoned_with(store: AdapterStore, tiny_plm: str) -> None:
    with application(store, tiny_plm, {"limits": {"adapter_norm": 0.5}}) as app:
        others = [("ann", "lovely"), ("bob", "lovely"), ("stranger", "lovely")]
        before = [scores(ask(app, [row])) for row in others]
        absurd = {"examples": [{"text": "lovely" if place % 2 else "dull", "label": "perhaps"} for place in range(64)]}
        mild = app.http.put("/v1/users/mallory/examples", json=EXAMPLES).json()
        flood = app.http.put("/v1/users/mallory/examples", json=absurd).json()
        assert mild["loss_after"] < mild["loss_before"] and flood["loss_after"] < flood["loss_before"]
        record = store.get_fresh(store.key("mallory")).record  # type: ignore[union-attr]
        assert abs((record.astype(float) ** 2).mean() ** 0.5 - 0.5) < 1e-6  # the prior is N(0, 1): on the bound
        assert [scores(ask(app, [row])) for row in others] == before
