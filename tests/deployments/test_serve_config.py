"""The Serve config files that production deploys, deployed for real: behind HAProxy, and behind Ray Serve's own proxy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import yaml
from ray.serve._private.constants import RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S

from cluster.node_process import free_port
from cluster.serve_environment import haproxy_environment, plain_environment
from deployments.app import build
from plora_ray.client import Client
from plora_ray.store import AdapterStore
from tests.generations import publish

ROOT = Path(__file__).parents[2]


@contextmanager
def deployed(form: str, tree: dict[str, Any], serving: dict[str, Any], folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The URL of deployments/{form}, run by Ray Serve's own command with these settings."""
    publish(AdapterStore(tree["store"]["uri"]), tree["model"]["name"], "g1", ["ann"])
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump({**tree, "serving": serving}))
    config = yaml.safe_load((ROOT / "deployments" / form).read_text())
    assert config["applications"][0]["args"] == {"config": "/etc/plora/settings.yaml"}
    config["applications"][0]["args"]["config"] = str(settings)  # the one thing that differs here: where the settings lie
    port = config["http_options"]["port"] = free_port()
    file, log = folder / "serve.yaml", folder / "serve.log"
    file.write_text(yaml.safe_dump(config))
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", "--app-dir", str(ROOT), str(file)],
            env={**inherited, **environment, "RAY_AUTH_MODE": "disabled"}, stdout=output, stderr=subprocess.STDOUT, cwd=folder,
            start_new_session=True,
        )  # fmt: skip
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            deadline = time.monotonic() + 150
            while not client.ready():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def test_the_production_serve_config_deploys_behind_haproxy_and_answers(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    serving = {"replica_cpus": 0.5, "replicas": [1, 2]}
    with deployed("serve.yaml", tiny_tree, serving, tmp_path, haproxy_environment()) as url, Client(url) as client:
        answers = client.predict([("ann", "a text"), ("somebody", "a text")])
        assert [answer["personalization"] for answer in answers] == ["adapter", "population"]


def test_a_replica_that_goes_has_time_to_answer_the_last_request_that_haproxy_sends_it(tiny_tree: dict[str, Any]) -> None:
    tree = {**tiny_tree, "serving": {"proxy": "haproxy", "request_timeout_s": 2}}
    given_s = build({"settings": tree})._bound_deployment._deployment_config.graceful_shutdown_timeout_s
    assert given_s > RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S + 2


def test_the_plain_serve_config_keeps_a_user_on_one_replica_by_the_header(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    serving = {"proxy": "serve", "replicas": 2, "replica_cpus": 0.5, "unknown_user_ttl_s": 3600}
    patient = {f"RAY_SERVE_{most}QUEUE_LENGTH_RESPONSE_DEADLINE_S": "20" for most in ("", "MAX_")}  # of a busy machine: it isn't the point
    with (
        deployed("serve-plain.yaml", tiny_tree, serving, tmp_path, {**plain_environment(), **patient}) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):

        def seen(user: str, headers: dict[str, str]) -> set[str]:
            body = {"inputs": [{"user_id": user, "text": "a text"}]}
            answers = [http.post("/v1/predict", json=body, headers=headers).json() for _ in range(16)]
            return {answer["predictions"][0]["personalization"] for answer in answers}

        def adapt(user: str) -> set[str]:
            """How users of any replica are answered once the one that takes the header's requests has taken examples."""
            assert seen(user, {}) == {"population"}  # whichever replicas there are remember for an hour that they don't know the user
            body = {"examples": [{"text": "lovely", "label": "yes"}]}
            assert http.put(f"/v1/users/{user}/examples", json=body, headers={"X-User-Id": user}).status_code == 200
            return seen(user, {})

        deadline = time.monotonic() + 60
        early = (f"early {place}" for place in count())
        while adapt(next(early)) != {"adapter", "population"}:
            assert time.monotonic() < deadline, "the second replica doesn't come"
        for user in ("ben", "cem", "dan"):
            assert adapt(user) == {"adapter", "population"}, "without the header requests go to any replica"
            assert seen(user, {"X-User-Id": user}) == {"adapter"}, "another replica than the one that took the examples answered"
