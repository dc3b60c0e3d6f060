"""The interface as its own description says it is: every operation, with inputs drawn from its schemas and inputs that break them.

Every status of the contract, and where it is provoked:

    200, 204  here: requests that fit the description
    400       here and test_http.py: no JSON
    401, 403  test_auth.py, test_doors.py
    404       here; test_http.py: a user without an adapter, another model's name
    405       below
    409       below: erased meanwhile; test_bringing.py: another basis
    413       test_http.py: body, items, characters; test_bringing.py
    422       test_http.py: field by field; test_bringing.py
    429       below: a full queue; test_doors.py: rates of callers and of users
    500       below: a bug
    503       below: no generation, no store, a generation that can't be loaded; test_doors.py: a deadline; test_auth.py: no keys
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from plora_ray.store import AdapterStore
from tests.deployments.in_process import KEY, Application, application, bearer
from tests.generations import publish

EXAMPLES = 12


@pytest.fixture(scope="module")
def app(tiny_plm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    folder: Path = tmp_path_factory.mktemp("interface")
    store = AdapterStore(str(folder / "store"))
    publish(store, tiny_plm, "g1", ["ann"])
    (folder / "key").write_text(KEY)
    limits = {"inputs": 8, "examples": 4, "text_chars": 200, "adaptations_per_minute": 10_000}
    auth = {"algorithm": "HS256", "key_file": str(folder / "key")}
    with application(store, tiny_plm, {"auth": auth, "limits": limits, "audit": {"enabled": False}}) as app:
        yield app


CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, negative_data_rejection,
    ignored_auth,
]  # fmt: skip


def answers(operation: Any, mode: GenerationMode) -> set[int]:
    """Statuses of the answers to inputs drawn for this operation, each answer checked against the description."""
    statuses = set()

    @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(mode))
    def ask(case: Any) -> None:
        statuses.add(case.call_and_validate(headers=bearer(users="*"), checks=CHECKS).status_code)

    ask()
    return statuses


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_that_fits_or_breaks_the_description_makes_an_error_or_an_answer_that_it_does_not_name(
    app: Application, mode: GenerationMode
) -> None:
    operations = [found.ok() for found in schemathesis.openapi.from_asgi("/openapi.json", app.api).get_all_operations()]
    breakable = [operation for operation in operations if operation.body or operation.path_parameters or operation.headers]
    statuses = {operation.label: answers(operation, mode) for operation in (operations if mode is GenerationMode.POSITIVE else breakable)}
    if mode is GenerationMode.POSITIVE:  # the inputs got through to the handlers
        reached = ("POST /v1/predict", "DELETE /v1/users/{user_id}", "GET /v1/generations")
        assert all(min(statuses[label]) < 300 for label in reached)
    else:
        assert all(400 <= status < 500 for label, seen in statuses.items() if label.startswith("P") for status in seen)


def problem(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status and answer.headers["Content-Type"] == "application/problem+json", answer.text
    assert (status in (429, 503)) == ("Retry-After" in answer.headers)
    document: dict[str, Any] = answer.json()
    assert document["status"] == status and document["title"] and document["detail"]
    return document


BODY = {"inputs": [{"user_id": "ann", "text": "a text"}] * 3}
EXAMPLE = {"examples": [{"text": "lovely", "label": "yes"}]}


def test_a_full_queue_is_429_another_method_405_and_a_bug_500_without_its_cause(
    tiny_plm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g1", ["ann"])
    with application(store, tiny_plm, {"limits": {"queued_texts": 2}}) as app:
        problem(app.http.post("/v1/predict", json=BODY), 429)
        assert "POST" in app.http.get("/v1/predict").headers["Allow"]
        problem(app.http.get("/v1/predict"), 405)

        def bug(_: object) -> None:
            raise RuntimeError("a secret of the inside")

        monkeypatch.setattr(app.service, "erase", bug)
        assert "secret" not in str(problem(app.http.delete("/v1/users/ann"), 500))


def test_an_adapter_of_a_user_who_is_erased_while_it_is_fitted_is_409(
    tiny_plm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g1", ["ann"])
    with application(store, tiny_plm, {}) as app:
        fit = app.fits._fit

        def overtaken(*arguments: Any) -> Any:
            store.erase(store.key("ann"))
            return fit(*arguments)

        monkeypatch.setattr(app.fits, "_fit", overtaken)
        problem(app.http.put("/v1/users/ann/examples", json=EXAMPLE), 409)


def test_without_a_generation_or_a_store_health_says_so_and_the_rest_is_503(tiny_plm: str, tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path / "store"))
    with application(store, tiny_plm, {}) as app:
        assert app.http.get("/healthz").status_code == 200
        for path in ("/readyz", "/v2/health/ready", "/v2/models/plora/ready", "/v1/users/ann"):
            problem(app.http.get(path), 503)
        problem(app.http.post("/v1/predict", json=BODY), 503)
        publish(store, tiny_plm, "g1", ["ann"])
        publish(store, tiny_plm, "g2", ["ann"])
        store.objects.delete("generations/g2/shared.safetensors")
        problem(app.http.post("/v1/generations/g2/activate"), 503)
        assert app.http.post("/v1/generations/g1/activate").status_code == 200
        (tmp_path / "store").rename(tmp_path / "gone")
        (tmp_path / "store").write_text("not a folder")
        problem(app.http.get("/v1/users/ann"), 503)
        problem(app.http.put("/v1/users/ann/examples", json=EXAMPLE), 503)
