"""The Python client and connections that break: it tries again by itself."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from plora_ray.client import Client

ANSWER = json.dumps({"predictions": [{"label": "yes"}]}).encode()


class Breaking(BaseHTTPRequestHandler):
    """Reads requests and hangs up without an answer, but for each third one."""

    asked = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked += 1
        if self.asked % 3:
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_a_request_whose_connection_broke_is_sent_again_until_it_is_answered() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_address[1]}") as client:
            assert client.predict([("ann", "a text")]) == [{"label": "yes"}]
        server.shutdown()
    assert Breaking.asked == 3
