"""The local S3 server: starts, answers, ends, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from plora_ray.store import ObjectStore

REPOSITORY = Path(__file__).parents[2]


def test_the_command_serves_until_sigterm_and_keeps_its_objects(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.s3_server", "--dir", str(tmp_path), "--bucket", "adapters"]
    options = {"key": "k", "secret": "s", "client_kwargs": {"region_name": "us-east-1"}}
    for expected in (None, b"kept"):
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[2].rstrip(",")
            objects = ObjectStore("s3://adapters/x", options | {"endpoint_url": url})
            assert objects.read_many(["a"]).get("a") == expected
            objects.write("a", b"kept")
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=2)
