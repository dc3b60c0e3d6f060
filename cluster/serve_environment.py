"""Environment variables that put Ray Serve behind HAProxy, or keep users on their replica without it, with the reason for each.

Ray reads them when a process starts, so they must stand in the environment of every node, head and workers, and of the
driver before any Ray process exists. This file knows their names and values; it starts nothing.
"""

from __future__ import annotations

from pathlib import Path

USER_HEADER = "x-user-id"
# Bounded load: a replica may get this many per cent of the mean before its users spill over to the next one on the ring.
BALANCE_FACTOR_PERCENT = 150


def haproxy_environment() -> dict[str, str]:
    """Variables for one hop through HAProxy straight to a replica, with users kept on their replica."""
    return {
        # HAProxy accepts connections and replicas listen themselves; the Python proxy leaves the request path.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # Requests run on the replica's own event loop and log lines are buffered: half again as many requests a second.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # A user's requests meet the cache that holds the user. The value is pasted behind `balance` in HAProxy's backend
        # section, so the lines after the first are directives of their own: a consistent ring moves few users when replicas
        # come and go, and the factor keeps one popular user from overloading a replica.
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": (
            f"hdr({USER_HEADER})\n    hash-type consistent\n    hash-balance-factor {BALANCE_FACTOR_PERCENT}"
        ),
        # A request that was under way on a replica that died is sent to another one. Every call of the interface may be repeated:
        # predictions change nothing, and adapting, erasing and activating twice end where once does. Ray's default repeats only
        # what never reached a replica. A body above HAProxy's buffer (16 KiB) isn't kept, so it isn't repeated.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    }


def plain_environment() -> dict[str, str]:
    """Variables for Ray Serve's own proxy: the header by which ConsistentHashRouter keeps a user on one replica."""
    return {"RAY_SERVE_SESSION_ID_HEADER_KEY": USER_HEADER}


def shared_port_environment(port: int) -> dict[str, str]:
    """Variables that let every worker node of one machine run its HAProxy at `port`, for `proxy_location: EveryNode`.

    The kernel spreads new connections over those that live, as a Kubernetes service does. The head's HAProxy keeps the Serve
    config's own port and so gets no requests, as behind `excludeHeadPodFromServeSvc`.
    """
    return {"SERVE_SOCKET_REUSE_PORT_ENABLED": "1", "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(port)}


def haproxy_files(directory: Path) -> dict[str, str]:
    """Variables that keep HAProxy's configuration, sockets and state below `directory` instead of /tmp/haproxy-serve.

    Ray puts a folder named by the node's id (56 characters) between the directory and each file, and HAProxy refuses sockets
    whose paths have more than 97: hence names of one letter, which leave 38 for the directory.
    """
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "a"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
    }
