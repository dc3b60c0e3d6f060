"""An HTTP proxy in front of an S3 server that fails on demand: refuses, hangs, breaks the connection, or loses answers to what was done.

It forwards bytes and knows S3 only by the form of its errors. Every request is logged with what the client got to see.
"""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, Self
from urllib.parse import urlsplit

# lost: the request is carried out, its answer never arrives; hang: nothing is done, and nothing heard until the outage ends
Fault = Literal["503", "SlowDown", "reset", "lost", "hang"]
HANG_S = 600.0
HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "keep-alive"}


@dataclass
class Outage:
    """From the first request that matches `begins_at` ("PUT /bucket/key" style), after `spared` others, everything fails for `seconds`."""

    fault: Fault
    begins_at: re.Pattern[str]
    seconds: float
    spared: int = 0
    began_s: float | None = None

    def covers(self, request: str) -> bool:
        if self.began_s is None:
            if not self.begins_at.search(request):
                return False
            if self.spared:
                self.spared -= 1
                return False
            self.began_s = time.monotonic()
        return time.monotonic() - self.began_s < self.seconds


class FaultyS3:
    """The proxy as a context manager. delivered: (request, status) of everything a client got an answer to."""

    def __init__(self, server_url: str) -> None:
        self.server = urlsplit(server_url)
        self.delivered: list[tuple[str, int]] = []
        self.failed: list[str] = []
        self._outages: list[Outage] = []
        self.healed = threading.Event()
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def fail(self, fault: Fault, begins_at: str, seconds: float, spared: int = 0) -> Outage:
        """Plan an outage; several may be planned, each begins at its own request."""
        outage = Outage(fault, re.compile(begins_at), seconds, spared)
        self.healed.clear()
        with self._lock:
            self._outages.append(outage)
        return outage

    def heal(self) -> None:
        """End and forget all outages."""
        with self._lock:
            self._outages.clear()
        self.healed.set()

    def fault_for(self, request: str) -> Fault | None:
        with self._lock:
            covering = [outage for outage in self._outages if outage.covers(request)]
            if covering:
                self.failed.append(request)
            return covering[0].fault if covering else None

    def times_delivered(self, pattern: str) -> dict[str, int]:
        """How often each matching request succeeded and its client knows."""
        counts: dict[str, int] = {}
        for request, status in list(self.delivered):
            if status == 200 and re.search(pattern, request):
                counts[request] = counts.get(request, 0) + 1
        return counts

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def _handler_for(proxy: FaultyS3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            assert "chunked" not in self.headers.get("Transfer-Encoding", ""), "this proxy forwards bodies of known length"
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = f"{self.command} {self.path}"
            fault = proxy.fault_for(request)
            if fault == "hang":
                proxy.healed.wait(HANG_S)
            if fault in ("hang", "reset"):
                return self.break_off()
            if fault in ("503", "SlowDown"):
                code = "ServiceUnavailable" if fault == "503" else fault
                error = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>Please reduce your request rate.</Message></Error>"
                return self.answer(503, [("Content-Type", "application/xml")], error.encode())
            upstream = http.client.HTTPConnection(proxy.server.hostname or "", proxy.server.port, timeout=60)
            try:
                upstream.request(self.command, self.path, body, dict(self.headers.items()))
                response = upstream.getresponse()
                data, headers = response.read(), response.getheaders()
            finally:
                upstream.close()
            if fault == "lost":
                return self.break_off()
            proxy.delivered.append((request, response.status))
            return self.answer(response.status, headers, data)

        def answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
            self.send_response_only(status)
            length = str(len(data))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                if name.lower() not in HOP_HEADERS:
                    self.send_header(name, value)
            if status not in (204, 304):
                self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def break_off(self) -> None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_: object) -> None:
            pass

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    return Handler
