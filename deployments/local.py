"""The application on a private cluster of this machine, with the production settings, until somebody stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from pathlib import Path

from plora_ray.config import Settings
from plora_ray.errors import ConfigError, PloraError
from plora_ray.opening import UNENCRYPTED
from plora_ray.runtime import private_cluster_environment, ray_temp_dir

APPLICATION = "plora"
PROXY_READY_WITHIN_S = 60  # Serve's own 5 s kills a proxy that only starts slowly on a busy machine
READY_POLL_S = 0.2
READY_WITHIN_S = 180.0
HAPROXY_DIRECTORY_LENGTH = 38  # below a longer one its socket paths would be refused; then it keeps its own place


class NotReady(PloraError):
    """The application didn't come up."""


def serve_until_interrupted(settings: Settings, port: int) -> None:
    """Start a local Ray cluster, deploy, print the address, wait for SIGINT or SIGTERM, stop everything.

    Raises ConfigError if the port is taken, NotReady if no replica gets ready.
    """
    host = "0.0.0.0" if settings.serving.proxy == "haproxy" else settings.serving.host
    _check_port(host, port)
    stop = threading.Event()
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(PROXY_READY_WITHIN_S))
    # Ray and Serve read these when they are imported, so both are imported after it.
    from cluster.serve_environment import haproxy_environment, haproxy_files, plain_environment

    if settings.serving.proxy == "serve":
        os.environ.update(plain_environment())
    else:
        os.environ.update(haproxy_environment())
        if (directory := ray_temp_dir()) is not None and len(directory) <= HAPROXY_DIRECTORY_LENGTH:
            os.environ.update(haproxy_files(Path(directory)))
    os.environ.update(private_cluster_environment())
    import ray
    from ray import serve

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="WARNING",
        _temp_dir=ray_temp_dir(),
        num_cpus=_cpus(settings),
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which installs handlers of its own
        signal.signal(number, lambda *_: stop.set())
    try:
        _deploy(settings, host, port, stop)
        if not stop.is_set():
            _announce(settings, port)
            stop.wait()
    finally:
        print("stopping ...", flush=True)
        with contextlib.suppress(TimeoutError):
            serve.delete(APPLICATION)  # the replicas end what they have; shutdown alone would take the proxy from under it
        serve.shutdown()
        ray.shutdown()


def _deploy(settings: Settings, host: str, port: int, stop: threading.Event) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions

    from deployments.app import build

    print("starting the replicas ...", flush=True)
    serve.start(http_options=HTTPOptions(host=host, port=port))
    application = build({"settings": settings.model_dump(mode="json")})
    serve.run(application, name=APPLICATION, route_prefix="/")
    _wait_until_ready(_reachable(host), port, stop)


def _wait_until_ready(host: str, port: int, stop: threading.Event) -> None:
    from plora_ray.client import Client

    with Client(f"http://{host}:{port}", timeout_s=5) as client:
        for _ in range(int(READY_WITHIN_S / READY_POLL_S)):
            if client.ready() or stop.wait(READY_POLL_S):
                return
    raise NotReady(f"no replica got ready within {READY_WITHIN_S:.0f} s: is a generation published in the store (plora generations list)?")


def _reachable(host: str) -> str:
    """Where a server that listens on `host` can be reached from here."""
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host


def _announce(settings: Settings, port: int) -> None:
    print(f"ready: http://{_reachable(settings.serving.host)}:{port}  (interface: /docs, stop: Ctrl-C)", flush=True)
    if settings.serving.auth.algorithm is None:
        print("AUTHENTICATION IS OFF: whoever reaches this port may read, adapt and erase every user (serving.auth.algorithm)", flush=True)
    if settings.store.encryption is None:
        print(UNENCRYPTED, flush=True)
    if settings.serving.proxy == "haproxy":
        print("HAProxy and the replicas listen on all interfaces; serving.proxy=serve listens on serving.host only", flush=True)


def _cpus(settings: Settings) -> int:
    """Enough logical CPUs for every replica and the Personalizer, however few the machine has; Ray only counts them."""
    serving = settings.serving
    return max(os.cpu_count() or 1, int(serving.replica_cpus * (serving.replica_range[1] + 1)) + 1)


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"port {port} on {host} can't be used ({error.strerror}): choose another with --port") from error
