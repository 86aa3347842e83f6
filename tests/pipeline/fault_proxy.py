"""An HTTP proxy before an S3 server that does to a share of the requests what networks and busy servers do."""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("slow down", "reset", "lost answer", "truncated", "stall")
"""503 SlowDown; a reset before the server hears of the request, or after it carried it out; a body that ends half
way through its Content-Length; silence before the answer."""

_HOP_HEADERS = frozenset({"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection"})
_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


class FaultProxy(ThreadingHTTPServer):
    """Passes requests on to ``upstream``; which of them it disturbs, and how, is drawn from ``seed``.

    The Host header is passed on as it came, because the client's signature covers it.

    Attributes:
        share: of the requests that are disturbed; may be changed at any time.
        faults: the kinds that are drawn from.
        only: a regular expression for ``METHOD PATH`` of the requests that may be disturbed.
        at_most: so many are disturbed; None: no bound.
        on_lost_answer: called once the server has carried out a request whose answer will be lost.
        injected: how often each was injected.
        requests: how often each method was seen.
    """

    daemon_threads = True

    def __init__(self, upstream: str, share: float, seed: int, stall_s: float):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream)
        self.share = share
        self.faults: tuple[str, ...] = FAULTS
        self.only = ""
        self.at_most: int | None = None
        self.on_lost_answer: Callable[[], None] = lambda: None
        self.stall_s = stall_s
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """For ``AWS_ENDPOINT_URL``."""
        return f"http://127.0.0.1:{self.server_port}"

    def draw(self, method: str, path: str) -> str | None:
        """What happens to the next request."""
        with self._lock:
            self.requests[method] += 1
            spent = self.at_most is not None and self.injected.total() >= self.at_most
            if self._random.random() >= self.share or spent or not re.match(self.only, f"{method} {path}"):
                return None
            fault = self._random.choice(self.faults)
            self.injected[fault] += 1
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that closes its connection is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""

    def _pass_on(self) -> None:
        fault = self.server.draw(self.command, self.path)
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "reset":
            self._reset()
            return
        if fault == "slow down":
            self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
            return
        if fault == "stall":
            time.sleep(self.server.stall_s)
        upstream = HTTPConnection(self.server.upstream.hostname or "", self.server.upstream.port, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_HEADERS:
                    upstream.putheader(name, value)
            upstream.endheaders(sent)
            response = upstream.getresponse()
            body = response.read()
        finally:
            upstream.close()
        if fault == "lost answer":
            self.server.on_lost_answer()
        if fault == "lost answer" or (fault == "truncated" and len(body) < 2):
            self._reset()
            return
        length = response.headers.get("Content-Length") if self.command == "HEAD" else str(len(body))
        self._answer(response.status, _kept(response, length), body, cut=fault == "truncated")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def _answer(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def _reset(self) -> None:
        """Close with an RST instead of a FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # The files hold the socket open; without this the kernel would wait for them.
        self.rfile.close()
        self.connection.close()
        self.close_connection = True


def _kept(response: HTTPResponse, length: str | None) -> dict[str, str]:
    headers = {name: value for name, value in response.headers.items() if name.lower() not in _HOP_HEADERS}
    return {**headers, **({"Content-Length": length} if length is not None else {})}


@contextmanager
def fault_proxy(upstream: str, share: float, seed: int = 0, stall_s: float = 2.0) -> Iterator[FaultProxy]:
    """A running proxy on loopback."""
    proxy = FaultProxy(upstream, share, seed, stall_s)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join(timeout=10)
