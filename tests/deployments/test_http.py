"""The application as clients meet it: real Ray Serve, real HTTP, a real store."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deployments import dashboard
from deployments.metrics import METRICS
from plora_ray.client import AsyncClient, Client, RequestFailed
from plora_ray.config import parse_settings
from plora_ray.errors import ConfigError
from plora_ray.scoring.job import score_table
from plora_ray.store import AdapterStore, RootKeySource
from tests.generations import publish

KEY = "a test key of more than 32 bytes ......"
USERS = [f"person {index}" for index in range(12)]
TEXT = "a text that people disagree about"
METRIC = re.compile(r"\bray_plora_\w+")
RAYS_OWN_LABELS = {
    "Component", "NodeAddress", "SessionName", "Version", "WorkerId", "JobId", "NodeId",
    "otel_scope_name", "otel_scope_version", "otel_scope_schema_url",
}  # fmt: skip
EXAMPLES = [("lovely", "yes"), ("dull", "no"), ("fine, I guess", "perhaps"), ("a joy", "yes")]


def bearer(scope: str, user: str = "service", **claims: str) -> str:
    return jwt.encode({"sub": user, "exp": time.time() + 3600, "scope": scope, **claims}, KEY, algorithm="HS256")


@dataclass
class Deployed:
    url: str
    store: AdapterStore
    plm: str
    token: str
    settings: dict[str, Any]

    def client(self) -> Client:
        return Client(self.url, token=self.token)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.token}"}, timeout=60)


@pytest.fixture(scope="module")
def deployed(tiny_plm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Two replicas and a Personalizer over an encrypted store with one generation, authentication on."""
    key_file: Path = tmp_path_factory.mktemp("keys") / "key"
    key_file.write_text(KEY)
    root_key = key_file.with_name("root.key")
    root_key.write_text("a7" * 32)
    store = AdapterStore(str(tmp_path_factory.mktemp("serving") / "store"), encryption=RootKeySource(key_file=root_key))
    publish(store, tiny_plm, "g1", USERS)
    import ray
    from ray import serve

    from cluster.node_process import free_port
    from deployments.app import build

    port = free_port()
    settings = {
        "model": {"name": tiny_plm, "max_length": 32},
        "store": {"uri": store.uri, "encryption": {"key_file": str(root_key)}},
        "serving": {
            "replicas": 2, "replica_cpus": 0.5, "refresh_s": 0.2, "unknown_user_ttl_s": 0.5, "adapter_max_age_s": 0.5,
            "auth": {"algorithm": "HS256", "key_file": str(key_file)},
            "limits": {"body_bytes": 100_000, "inputs": 50, "text_chars": 1000, "examples": 8, "queued_texts": 200},
        },
    }  # fmt: skip
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _system_config={"metrics_report_interval_ms": 500})
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build({"settings": settings}), name="plora")
        yield Deployed(f"http://127.0.0.1:{port}", store, tiny_plm, bearer("predict adapt erase admin", users="*"), settings)
    finally:
        serve.shutdown()
        ray.shutdown()


def scores(prediction: dict[str, object]) -> np.ndarray:
    values = prediction["scores"]
    assert isinstance(values, dict)
    return np.array([values[name] for name in ("no", "perhaps", "yes")])


def test_predictions_come_in_order_each_by_its_own_users_adapter(deployed: Deployed) -> None:
    with deployed.client() as client:
        inputs = [(USERS[3], TEXT), ("stranger", TEXT), (USERS[1], TEXT), (USERS[3], TEXT)]
        predictions = client.predict(inputs)
    assert [prediction["user_id"] for prediction in predictions] == [user for user, _ in inputs]
    assert [prediction["personalization"] for prediction in predictions] == ["adapter", "population", "adapter", "adapter"]
    assert all(set(prediction) == {"user_id", "label", "scores", "personalization", "generation"} for prediction in predictions)
    assert all(abs(sum(prediction["scores"].values()) - 1) < 1e-9 for prediction in predictions)
    assert all(prediction["label"] == max(prediction["scores"], key=prediction["scores"].get) for prediction in predictions)
    assert np.allclose(scores(predictions[0]), scores(predictions[3]), atol=1e-6)
    assert np.abs(scores(predictions[0]) - scores(predictions[2])).max() > 1e-3


def test_a_new_user_is_personal_in_the_next_answer_of_the_same_client_on_whichever_replica(deployed: Deployed) -> None:
    user = "new/user. ünïcode 🙂"
    with deployed.client() as client:
        before = client.predict([(user, "lovely")])[0]
        adapted = client.adapt(user, EXAMPLES)
        for _ in range(10):  # two replicas: some of these land on the one that didn't see the adaptation
            after = client.predict([(user, "lovely")])[0]
            assert after["personalization"] == "adapter"
            assert after["scores"]["yes"] > before["scores"]["yes"]
        assert adapted["examples"] == 4 and adapted["loss_after"] < adapted["loss_before"]
        shown = client.user(user)
    assert (shown["user_id"], shown["examples"], shown["personalization"]) == (user, 4, "adapter")
    assert before["personalization"] == "population"


def test_an_erased_user_is_gone_from_every_replica_within_the_refresh_time_and_may_come_back(deployed: Deployed) -> None:
    user = USERS[7]
    with deployed.client() as client:
        assert client.predict([(user, TEXT)])[0]["personalization"] == "adapter"
        client.erase(user)
        with pytest.raises(RequestFailed, match="404"):
            client.user(user)
        time.sleep(0.6)
        assert {client.predict([(user, TEXT)])[0]["personalization"] for _ in range(10)} == {"population"}
        client.adapt(user, EXAMPLES)
        assert client.predict([(user, TEXT)])[0]["personalization"] == "adapter"
        client.erase(user)


def test_generations_and_a_canary_come_and_go_under_load_without_a_failed_or_a_mixed_answer(deployed: Deployed) -> None:
    stop, failures, seen = threading.Event(), [], set()

    def load() -> None:
        with deployed.http() as http:
            while not stop.is_set():
                inputs = [{"user_id": user, "text": TEXT} for user in USERS[:6]]
                answer = http.post("/v1/predict", json={"inputs": inputs})
                generations = {item["generation"] for item in answer.json().get("predictions", [])}
                if answer.status_code != 200 or len(generations) != 1:
                    failures.append(answer.text)
                seen.update(generations)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    publish(deployed.store, deployed.plm, "g2", USERS, seed=5)
    deadline = time.monotonic() + 60
    with deployed.client() as client:
        while time.monotonic() < deadline and {client.predict([(USERS[0], TEXT)])[0]["generation"] for _ in range(8)} != {"g2"}:
            time.sleep(0.1)
        assert client.activate("g1")["generation"] == "g1"
        while time.monotonic() < deadline and {client.predict([(USERS[0], TEXT)])[0]["generation"] for _ in range(8)} != {"g1"}:
            time.sleep(0.1)
        listed = {item["generation"]: item for item in client.generations()}
        deployed.store.set_canary("g2", 0.5)
        canary = deployed.store.canary()
        assert canary is not None
        expected = {user: "g2" if canary.takes(deployed.store.key(user)) else "g1" for user in [*USERS[:6], "stranger 1", "stranger 2"]}
        assert set(expected.values()) == {"g1", "g2"}
        for wanted in (expected, dict.fromkeys(expected, "g1")):
            while time.monotonic() < deadline and not all(
                {client.predict([(user, TEXT)])[0]["generation"] for _ in range(4)} == {name} for user, name in wanted.items()
            ):
                time.sleep(0.1)
            deployed.store.set_canary("g2", 0)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures and {"g1", "g2"} <= seen and time.monotonic() < deadline
    assert listed["g1"]["current"] and not listed["g2"]["current"] and listed["g2"]["users"] == 12


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"{not json", 400, None),
        (b"[1, 2]", 422, "body"),
        (b"{}", 422, "inputs"),
        (b'{"inputs": []}', 422, "inputs"),
        (b'{"inputs": [{"user_id": "u"}]}', 422, "inputs[0].text"),
        (b'{"inputs": [{"user_id": "u", "text": "  "}]}', 422, "inputs[0].text"),
        (b'{"inputs": [{"user_id": "", "text": "x"}]}', 422, "inputs[0].user_id"),
        (b'{"inputs": [{"user_id": 7, "text": "x"}]}', 422, "inputs[0].user_id"),
        (b'{"inputs": [{"user_id": "u", "text": "x", "colour": 1}]}', 422, "inputs[0].colour"),
        (json.dumps({"inputs": [{"user_id": "u" * 10_000, "text": "x"}]}).encode(), 422, "inputs[0].user_id"),
        (json.dumps({"inputs": [{"user_id": "u", "text": "x" * 2000}]}).encode(), 413, "inputs[0].text"),
        (json.dumps({"inputs": [{"user_id": "u", "text": "x"}] * 51}).encode(), 413, None),
        (json.dumps({"inputs": [{"user_id": "u", "text": "x" * 200_000}]}).encode(), 413, None),
    ],
)
def test_bad_requests_are_problem_documents_that_name_the_field(deployed: Deployed, body: bytes, status: int, field: str | None) -> None:
    with deployed.http() as http:
        answer = http.post("/v1/predict", content=body, headers={"Content-Type": "application/json"})
    problem = answer.json()
    assert answer.status_code == status and answer.headers["Content-Type"] == "application/problem+json"
    assert problem["status"] == status and problem["detail"]
    if field is not None:
        assert field in [item["field"] for item in problem["errors"]]


def test_a_chunked_body_over_the_limit_is_refused_too(deployed: Deployed) -> None:
    with deployed.http() as http:
        chunks = (b"x" * 10_000 for _ in range(30))
        assert http.post("/v1/predict", content=chunks, headers={"Content-Type": "application/json"}).status_code == 413


def test_an_unknown_label_and_a_foreign_version_token_are_named(deployed: Deployed) -> None:
    with deployed.http() as http:
        answer = http.put("/v1/users/u/examples", json={"examples": [{"text": "a", "label": "yes"}, {"text": "b", "label": "maybe"}]})
        assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == "examples[1].label"
        answer = http.post("/v1/predict", json={"inputs": [{"user_id": "u", "text": "a"}]}, headers={"X-Adapter-Version": "latest"})
        assert answer.status_code == 422
        assert http.get("/v1/users/u").status_code == 404


def test_rights_are_checked_before_anything_else(deployed: Deployed) -> None:
    own = bearer("predict", user=USERS[0])
    with httpx.Client(base_url=deployed.url) as http:
        body = {"inputs": [{"user_id": USERS[0], "text": TEXT}]}
        other = {"inputs": [{"user_id": USERS[0], "text": TEXT}, {"user_id": USERS[1], "text": TEXT}]}

        def status(method: str, path: str, token: str | None = own, json: object = None) -> int:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            return http.request(method, path, json=json, headers={**headers, "X-User-Id": USERS[0]}).status_code

        assert status("POST", "/v1/predict", json=body) == 200
        assert status("POST", "/v1/predict", token=None, json=body) == 401
        assert status("POST", "/v1/predict", json=other) == 403
        assert status("PUT", f"/v1/users/{USERS[0]}/examples", json={"examples": [{"text": "a", "label": "yes"}]}) == 403
        assert status("DELETE", f"/v1/users/{USERS[0]}") == 403
        assert status("GET", f"/v1/users/{USERS[1]}") == 403
        assert status("GET", "/v1/generations") == 403
        assert status("POST", "/v1/generations/g1/activate") == 403
        assert status("GET", "/healthz", token=None) == status("GET", "/readyz", token=None) == 200
        wrong = jwt.encode({"sub": USERS[0], "exp": time.time() + 60, "scope": "predict"}, "x" * 40, algorithm="HS256")
        assert status("POST", "/v1/predict", token=wrong, json=body) == 401


def test_the_open_inference_protocol_gives_the_same_answers(deployed: Deployed) -> None:
    with deployed.http() as http, deployed.client() as client:
        plain = client.predict([(USERS[2], TEXT), ("nobody", TEXT)])
        tensor = {"datatype": "BYTES", "shape": [2]}
        inputs = [{"name": "text", "data": [TEXT, TEXT], **tensor}, {"name": "user_id", "data": [USERS[2], "nobody"], **tensor}]
        answer = http.post("/v2/models/plora/infer", json={"id": "42", "inputs": inputs}).json()
        outputs = {output["name"]: output for output in answer["outputs"]}
        assert answer["id"] == "42" and outputs["label"]["data"] == [item["label"] for item in plain]
        assert outputs["scores"]["shape"] == [2, 3]
        assert np.allclose(outputs["scores"]["data"], [score for item in plain for score in item["scores"].values()], atol=1e-6)
        assert outputs["personalization"]["data"] == ["adapter", "population"]
        assert http.get("/v2/health/live").json() == {"live": True} and http.get("/v2/health/ready").json() == {"ready": True}
        assert http.get("/v2/models/plora").json()["inputs"][0] == {"name": "text", "datatype": "BYTES", "shape": [-1]}
        assert http.get("/v2/models/other").status_code == 404
        inputs[0]["data"] = [TEXT]
        assert http.post("/v2/models/plora/infer", json={"inputs": inputs}).status_code == 422


async def _both_clients(deployed: Deployed) -> None:
    async with AsyncClient(deployed.url, token=deployed.token) as client:
        await client.adapt("async user", EXAMPLES)
        for _ in range(10):  # on both replicas
            assert (await client.predict([("async user", TEXT)]))[0]["personalization"] == "adapter"
        await client.erase("async user")
        with pytest.raises(RequestFailed):
            await client.user("async user")


def test_the_asynchronous_client_does_what_the_synchronous_one_does(deployed: Deployed) -> None:
    import asyncio

    asyncio.run(_both_clients(deployed))


def test_the_interface_describes_itself(deployed: Deployed) -> None:
    with deployed.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    for path in ("/v1/predict", "/v1/users/{user_id}/examples", "/v1/users/{user_id}", "/v1/generations", "/healthz", "/readyz"):
        assert path in paths


def test_every_metric_of_the_dashboard_is_exported_and_none_of_its_labels_names_a_user(deployed: Deployed) -> None:
    import ray

    user = "somebody with a name"
    with deployed.client() as client:
        for _ in range(8):  # both replicas
            client.predict([(USERS[0], TEXT), (user, TEXT)])
        client.adapt(user, EXAMPLES)
        client.erase(user)
    named = {name for panel in dashboard.dashboard()["panels"] for target in panel["targets"] for name in METRIC.findall(target["expr"])}
    assert len(named) >= len(METRICS)
    (port,) = [node["MetricsExportPort"] for node in ray.nodes()]
    deadline, exported = time.monotonic() + 60, ""
    while not (named <= set(METRIC.findall(exported)) and re.search(r'call="erase".*outcome="ok"', exported)):
        assert time.monotonic() < deadline, f"never exported: {sorted(named - set(METRIC.findall(exported)))}"
        time.sleep(0.2)
        exported = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    ours = [line for line in exported.splitlines() if METRIC.match(line)]
    labels = {label for line in ours for label in re.findall(r'(\w+)="', line)}
    assert labels <= {"le", *(label for metric in METRICS.values() for label in metric.labels), *RAYS_OWN_LABELS}
    keys = [deployed.store.key(name).hex() for name in (user, USERS[0])]
    assert not any(word in line for line in ours for word in (user, USERS[0], *keys))
    resident = [float(line.split()[-1]) for line in ours if line.startswith("ray_plora_resident_users")]
    assert resident and all(0 < users <= 12 for users in resident)


def test_a_table_is_answered_on_the_cluster_and_a_stopped_job_goes_on_with_its_generation(deployed: Deployed, tmp_path: Path) -> None:
    rows = [((*USERS, "stranger")[place % 13], f"{TEXT} {place}") for place in range(60)]
    columns = {"user_id": [user for user, _ in rows], "text": [text for _, text in rows]}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet", row_group_size=20)
    tree = {"model": deployed.settings["model"], "store": deployed.settings["store"], "serving": {"replica_cpus": 0.5}}
    settings, seen = parse_settings(tree), []
    out = tmp_path / "out"
    scored = score_table(settings, str(tmp_path / "rows.parquet"), str(out), lambda done, total: seen.append((done, total)))
    known = [user for user in USERS if not deployed.store.is_erased(deployed.store.key(user))]  # other tests erase some
    assert (scored.rows, scored.personal, scored.skipped) == (60, sum(user in known for user, _ in rows), 0) and known
    assert seen[0] == (0, 3) and seen[-1] == (3, 3)
    first = pq.read_table(out).to_pylist()
    with deployed.client() as client:
        served = client.predict(rows[:30])
    for row, answer in zip(first, served, strict=False):
        assert (row["user_id"], row["label"], row["personalization"]) == (answer["user_id"], answer["label"], answer["personalization"])
        assert np.allclose([row["scores"][name] for name in ("no", "perhaps", "yes")], scores(answer), atol=1e-5)
    publish(deployed.store, deployed.plm, "g9", USERS, seed=9)
    (out / "_done" / "00001.json").unlink()
    (out / "part-00001-00000.parquet").unlink()
    again = score_table(settings, str(tmp_path / "rows.parquet"), str(out))
    deployed.store.activate("g1")
    assert again.generation == scored.generation == "g1" and pq.read_table(out).to_pylist() == first
    pq.write_table(pa.table(columns).slice(1), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match="holds answers of other rows.*name a new directory"):
        score_table(settings, str(tmp_path / "rows.parquet"), str(out))
