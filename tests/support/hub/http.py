"""How requests are read and answered, whatever they ask for; faults happen here."""

import json
import socket
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.support.hub.faults import Fault, wait
from tests.support.hub.store import HubError, Token

_PIECE = 1 << 16


@dataclass
class Request:
    """One request; `words` are the named groups of the route that it matched, not quoted."""

    method: str
    path: str
    query: dict[str, str]
    headers: Any
    token: Token | None = None
    body: bytes = b""
    words: dict[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """What is sent back."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, content: Any, status: int = 200, **headers: str) -> "Answer":
        """JSON."""
        known = {"Content-Type": "application/json; charset=utf-8"}
        return cls(json.dumps(content).encode(), status, known | {k.replace("_", "-"): v for k, v in headers.items()})

    @classmethod
    def of_error(cls, error: HubError) -> "Answer":
        told = {"X_Error_Message": error.message} | ({"X_Error_Code": error.code} if error.code else {})
        return cls.of(error.body, error.status, **told)


class Dropped(Exception):
    """The connection was closed on purpose."""


class Handler(BaseHTTPRequestHandler):
    """Reads requests, lets faults happen, and answers with what `server.hub.serve` returns."""

    protocol_version = "HTTP/1.1"  # connections stay open, so every answer says how long it is
    timeout = 60

    def log_message(self, *args) -> None:
        """Nothing: tests look at `HubServer.requests`."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        request = Request(self.command, unquote(parts.path), dict(parse_qsl(parts.query)), self.headers)
        hub = self.server.hub
        line = f"{request.method} {request.path}"
        faults = hub.faults.happening_to(line)
        try:
            wait(faults)
            request.body = self._read_body(faults)
            hub.requests.append(line)
            failing = next((fault for fault in faults if fault.status is not None), None)
            answer = _failure(failing) if failing else hub.serve(request, urlsplit(self.path).path)
            if any(fault.drop_after == -1 for fault in faults):
                raise Dropped
            self._send(answer, faults)
        except (Dropped, ConnectionError, TimeoutError):
            self._drop()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self, faults: list[Fault]) -> bytes:
        """Of a known length, or in chunks as clients send what they read from a stream."""
        limits = [fault.drop_after for fault in faults if (fault.drop_after or -1) >= 0 and self.command != "GET"]
        speeds = [fault.per_second for fault in faults if fault.per_second and self.command != "GET"]
        body = bytearray()
        for length in self._lengths():
            while length:
                piece = self.rfile.read(min(_PIECE, length))
                if not piece:
                    raise Dropped
                body += piece
                length -= len(piece)
                if limits and len(body) >= min(limits):
                    raise Dropped
                if speeds:
                    time.sleep(len(piece) / min(speeds))
        if limits:
            raise Dropped
        return bytes(body)

    def _lengths(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield int(self.headers.get("Content-Length") or 0)
            return
        while length := int(self.rfile.readline().split(b";")[0], 16):
            yield length
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, answer: Answer, faults: list[Fault]) -> None:
        body = answer.body
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value.encode("latin-1", "replace").decode("latin-1"))
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Request-Id", "loopback")
        self.end_headers()
        if self.command == "HEAD":
            return
        limits = [fault.drop_after for fault in faults if fault.drop_after is not None and self.command == "GET"]
        speeds = [fault.per_second for fault in faults if fault.per_second and self.command == "GET"]
        end = min([len(body), *limits])
        step = max(1, min(speeds) // 20) if speeds else _PIECE
        for start in range(0, end, step):
            self.wfile.write(body[start : min(start + step, end)])
            if speeds:
                time.sleep(step / min(speeds))
        if limits:
            raise Dropped

    def _drop(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the client was faster
            pass


def _failure(fault: Fault) -> Answer:
    answer = Answer.of_error(HubError(fault.status, fault.message))
    if fault.body is not None:
        answer = Answer(fault.body.encode(), fault.status, {"Content-Type": "text/html"})
    if fault.retry_after is not None:
        answer.headers["Retry-After"] = str(fault.retry_after)
    return answer
