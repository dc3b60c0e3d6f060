"""A local S3 server for tests and trial runs: ministack as a subprocess, reached over real HTTP.

Knows how to start, await and stop the server and to create buckets. Knows nothing about the adapter store. The server keeps
its objects under the given folder, honours If-None-Match and If-Match, and checks no signatures: never expose it.

    python -m cluster.s3_server --port 9000 --dir var/s3 --bucket plora
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
OWN_PORTS = (21_000, 31_000)  # above Ray's workers, below what systems hand out (net.ipv4.ip_local_port_range)

# Loopback must not go through a proxy that the environment names for everything else.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class S3Server:
    """One server process group on a loopback port; use it as a context manager.

    data_dir  where the objects and `server.log` go; created if missing
    port      0 picks a free one
    """

    def __init__(self, data_dir: str | Path, port: int = 0) -> None:
        self.data_dir = Path(data_dir).absolute()
        self.port = port or _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage_options(self) -> dict[str, Any]:
        """What fsspec's s3 file system needs to reach this server."""
        return {
            "key": "local",
            "secret": "local-secret",
            "endpoint_url": self.endpoint_url,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def start(self) -> Self:
        """Start the server and return once it answers. Raises RuntimeError with the log's tail if it doesn't."""
        if self._process is not None:
            raise RuntimeError("this S3 server is already started")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        _wait_until_free(self.port)
        environment = os.environ | {"S3_PERSIST": "1", "S3_DATA_DIR": str(self.data_dir / "objects"), "SERVICES": "s3"}
        command = [sys.executable, "-m", "hypercorn", "ministack.app:app", "-b", f"127.0.0.1:{self.port}"]
        with (self.data_dir / "server.log").open("ab") as log:
            # A process group of its own: the server forks, and all of it can then be ended without touching anybody else.
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            self._wait_until_it_answers(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def create_bucket(self, name: str) -> str:
        """Create bucket `name` if it is missing and return its s3:// URI."""
        request = urllib.request.Request(f"{self.endpoint_url}/{name}", method="PUT")
        try:
            _direct.open(request, timeout=10).close()
        except urllib.error.HTTPError as error:
            if error.code != 409:  # 409: it exists already
                raise RuntimeError(f"the S3 server at {self.endpoint_url} refused bucket {name!r}: HTTP {error.code}") from error
        return f"s3://{name}"

    def stop(self) -> None:
        """End the server's process group; harmless when it isn't running."""
        self._end(signal.SIGTERM, signal.SIGKILL)

    def kill(self) -> None:
        """End the server as a crash of its machine would, in the middle of whatever it does. `start` starts it again, with its objects."""
        self._end(signal.SIGKILL)

    def _end(self, *signs: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for sign in signs:
            try:
                os.killpg(process.pid, sign)  # the leader's pid is the group's id
            except ProcessLookupError:
                break
            try:
                process.wait(STOP_TIMEOUT_S if sign == signal.SIGTERM else None)
            except subprocess.TimeoutExpired:
                continue
        process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the S3 server ended at start with code {process.returncode}: {self._log_tail()}")
            try:
                _direct.open(self.endpoint_url, timeout=2).close()
                return
            except urllib.error.HTTPError:
                return  # any HTTP status is an answer
            except (OSError, http.client.HTTPException):
                time.sleep(0.1)
        raise RuntimeError(f"the S3 server didn't answer at {self.endpoint_url} within {START_TIMEOUT_S:.0f} s: {self._log_tail()}")

    def _log_tail(self) -> str:
        lines = (self.data_dir / "server.log").read_text(errors="replace").splitlines()
        return " | ".join(lines[-5:]) or "its log is empty"


def _free_port() -> int:
    """A port that stays free while the server is down for a moment: none that the system hands to connections by itself."""
    while not _is_free(port := random.randrange(*OWN_PORTS)):
        pass
    return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _wait_until_free(port: int) -> None:
    """After a kill the last of the server's processes may still hold the port; whoever else holds it is reported by the server."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not _is_free(port) and time.monotonic() < deadline:
        time.sleep(0.05)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.s3_server", description="Run a local S3 server until interrupted.")
    parser.add_argument("--port", type=int, default=0, help="loopback port; 0 (default) picks a free one")
    parser.add_argument("--dir", required=True, help="folder for the objects and the log")
    parser.add_argument("--bucket", action="append", default=[], help="bucket to create; may be repeated")
    options = parser.parse_args(arguments)
    ended = threading.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: ended.set())
    try:
        with S3Server(options.dir, options.port) as server:
            for bucket in options.bucket:
                server.create_bucket(bucket)
            print(f"S3 at {server.endpoint_url}, objects in {server.data_dir}", flush=True)
            ended.wait()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
