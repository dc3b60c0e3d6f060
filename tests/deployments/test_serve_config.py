"""The Serve config file that production deploys, deployed for real behind HAProxy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from cluster.node_process import free_port
from cluster.serve_environment import haproxy_environment
from plora_ray.client import Client
from plora_ray.store import AdapterStore
from tests.generations import publish

ROOT = Path(__file__).parents[2]


def test_the_production_serve_config_deploys_behind_haproxy_and_answers(tiny_tree: dict[str, Any], tmp_path: Path) -> None:
    publish(AdapterStore(tiny_tree["store"]["uri"]), tiny_tree["model"]["name"], "g1", ["ann"])
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump({**tiny_tree, "serving": {"replica_cpus": 0.5, "replicas": [1, 2]}}))
    config = yaml.safe_load((ROOT / "deployments" / "serve.yaml").read_text())
    assert config["applications"][0]["args"] == {"config": "/etc/plora/settings.yaml"}
    config["applications"][0]["args"]["config"] = str(settings)  # the one thing that differs here: where the settings lie
    port = config["http_options"]["port"] = free_port()
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    log = tmp_path / "serve.log"
    environment = {**os.environ, **haproxy_environment(), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", "--app-dir", str(ROOT), str(file)],
            env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True,
        )  # fmt: skip
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            deadline = time.monotonic() + 150
            while not client.ready():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.3)
            answers = client.predict([("ann", "a text"), ("somebody", "a text")])
            assert [answer["personalization"] for answer in answers] == ["adapter", "population"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
