"""A small HTTP/1.1 server for tests: it records what is asked and can misbehave on command.

`Proxy` stands before a real Orthanc; the stand-in answers by itself. Both share the faults, so that what is shown with
one holds for the other.
"""
from __future__ import annotations

import contextlib
import http.client
import http.server
import itertools
import json
import select
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, NamedTuple


class Request(NamedTuple):
    method: str
    path: str       # with the query, without the prefix
    body: bytes
    headers: dict

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def kind(self) -> str:
        """What the call is for: 'system', 'find study', 'find series', 'find instance', 'tags', 'content', …"""
        parts = urllib.parse.urlsplit(self.path).path.strip("/").split("/")
        if parts[:2] == ["tools", "find"]:
            return "find " + self.json["Level"].lower()
        return parts[2] if len(parts) > 2 else parts[0]

    @property
    def accessions(self) -> list[str]:
        """Those that a find asks for by their names, each once, also where it asks for one with a blank before it."""
        query = self.json["Query"] if self.kind.startswith("find ") else {}
        return [*dict.fromkeys(query["AccessionNumber"].replace("\\ ", "\\").split("\\"))] \
            if query.get("AccessionNumber") else []


class Answer(NamedTuple):
    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple = ()


# What may be done to an answer. Each is a function of the handler and the proper answer.
FAULTS: dict[str, Callable] = {}


def fault(function):
    FAULTS[function.__name__.replace("_", " ")] = function
    return function


def status_fault(code: int):
    FAULTS[f"status {code}"] = lambda handler, answer: handler.send(Answer(code, b'{"Message": "made to fail"}'))


for _code in (400, 404, 429, 500, 502, 503, 504):
    status_fault(_code)


@fault
def reset(handler, answer):
    """The connection is reset before anything is answered."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.drop()


@fault
def close(handler, answer):
    """The connection is closed without an answer, as an idle one is by Orthanc."""
    handler.drop()


@fault
def cut(handler, answer):
    """The answer ends in its middle."""
    handler.head(answer)
    handler.wfile.write(answer.body[:len(answer.body) // 2])
    handler.drop()


@fault
def hang(handler, answer):
    """No answer, however long the client waits."""
    if handler.endpoint.clock:
        handler.endpoint.clock.never(handler.client_address)
    handler.endpoint.stopping.wait()
    handler.drop()


def drip(handler, data: bytes):
    """One byte after the other, without end: every 50 ms, or with the test's own clock whenever the client reads."""
    with contextlib.suppress(OSError):
        for byte in itertools.chain(data, itertools.repeat(ord(" "))):
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            if not handler.wants_more():
                break
    handler.drop()


@fault
def slow(handler, answer):
    """An answer whose body drips."""
    handler.head(answer._replace(body=bytes(1 << 20)))
    drip(handler, answer.body)


@fault
def slow_header(handler, answer):
    """An answer whose header drips."""
    drip(handler, b"HTTP/1.1 200 OK\r\nX-Filler: ")


@fault
def html(handler, answer):
    """A page of some proxy, with status 200."""
    handler.send(Answer(200, b"<html><body>Please log in</body></html>", "text/html"))


@fault
def other_json(handler, answer):
    """JSON, but of another shape."""
    handler.send(Answer(200, b'{"what": ["is", {"this": 1}]}' if answer.body.lstrip()[:1] == b"[" else b'["what", 1]'))


@fault
def half_json(handler, answer):
    """The first half of the JSON text, in a complete answer."""
    handler.send(answer._replace(body=answer.body[:len(answer.body) // 2]))


@fault
def empty(handler, answer):
    handler.send(answer._replace(body=b""))


@fault
def redirect(handler, answer):
    handler.send(Answer(302, b"", headers=(("Location", "http://127.0.0.1:9/elsewhere"),)))


@fault
def no_http(handler, answer):
    """Something that is no HTTP at all."""
    handler.wfile.write(b"220 mail.example.org ESMTP\r\n")
    handler.drop()


def at(kind: str, fault) -> Callable[[int, Request], Any]:
    """What `misbehave` may be: this fault at every request of a kind."""
    return lambda count, request: fault if request.kind == kind else None


def answered_after(event: threading.Event) -> Callable[[Answer], Answer]:
    """The proper answer, once the test lets it go; the bound only ends a test that would hang."""
    def wait(answer: Answer) -> Answer:
        event.wait(120)
        return answer
    return wait


class Listener(http.server.ThreadingHTTPServer):
    endpoint: Endpoint
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass    # a client that went away


class Handler(http.server.BaseHTTPRequestHandler):
    server: Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self):
        super().setup()
        self.endpoint = self.server.endpoint

    def log_message(self, *_):
        pass

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = self.path.removeprefix(self.endpoint.prefix)
        request = Request(self.command, path, body, dict(self.headers))
        count = self.endpoint.record(request)
        if self.endpoint.delay:
            time.sleep(self.endpoint.delay)
        kind = self.endpoint.misbehave(count, request) if self.endpoint.misbehave else None
        if kind in ("reset", "close", "hang"):
            FAULTS[kind](self, None)
            return
        answer = self.endpoint.answer(request)
        if isinstance(kind, str):
            FAULTS[kind](self, answer)
        else:
            self.send(kind(answer) if kind else answer)

    do_GET = do_POST = do_DELETE = serve

    def gone(self) -> bool:
        """Whether the client has left, or the server is to end."""
        return self.endpoint.stopping.is_set() or bool(select.select([self.connection], [], [], 0)[0])

    def wants_more(self) -> bool:
        """Wait until it is time for another byte; whether there is anybody to read it."""
        if self.endpoint.clock:
            return self.endpoint.clock.drips(self.client_address, self.gone)
        return not self.endpoint.stopping.wait(0.05)

    def head(self, answer: Answer):
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def send(self, answer: Answer):
        self.head(answer)
        self.wfile.write(answer.body)
        self.wfile.flush()
        with self.endpoint.lock:
            self.endpoint.sent += len(answer.body)

    def drop(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()


class Endpoint:
    """A server on a free loopback port, as a context manager. Subclasses say what is answered.

    requests: what came, in order; sent: bytes of bodies; delay: seconds before each answer;
    misbehave(count, request): the name of a fault, a function of the answer, or None; clock: see clock.py.
    """

    clock: Any = None

    def __init__(self, prefix: str = "", tls=None, port: int = 0):
        self.prefix, self.tls, self.port = prefix, tls, port
        self.requests: list[Request] = []
        self.sent = 0
        self.delay = 0.0
        self.misbehave: Callable[[int, Request], Any] | None = None
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    def answer(self, request: Request) -> Answer:
        raise NotImplementedError

    def record(self, request: Request) -> int:
        with self.lock:
            self.requests.append(request)
            return len(self.requests)

    def forget(self):
        with self.lock:
            self.requests, self.sent = [], 0

    @property
    def kinds(self) -> list[str]:
        return [request.kind for request in self.requests]

    def __enter__(self):
        self.listener = Listener(("127.0.0.1", self.port), Handler)
        self.listener.endpoint = self
        if self.tls:
            self.listener.socket = self.tls.wrap_socket(self.listener.socket, server_side=True)
        port = self.listener.server_address[1]
        self.url = f"{'https' if self.tls else 'http'}://{'localhost' if self.tls else '127.0.0.1'}:{port}{self.prefix}"
        self.thread = threading.Thread(target=self.listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.listener.shutdown()
        self.listener.server_close()


class Proxy(Endpoint):
    """Passes requests on to a real server and counts them."""

    def __init__(self, target: str, **options):
        super().__init__(**options)
        url = urllib.parse.urlsplit(target)
        self.host, self.target_port = url.hostname or "", url.port
        self.local = threading.local()

    def connection(self) -> http.client.HTTPConnection:
        """This thread's connection to the real server."""
        if getattr(self.local, "connection", None) is None:
            self.local.connection = http.client.HTTPConnection(self.host, self.target_port, timeout=60)
        return self.local.connection

    def answer(self, request: Request) -> Answer:
        passed = ("authorization", "content-type", "accept-encoding")
        returned = ("content-encoding", "www-authenticate")
        headers = {name: value for name, value in request.headers.items() if name.lower() in passed}
        for _ in range(3):    # the real server may just have closed an idle connection
            connection = self.connection()
            try:
                connection.request(request.method, request.path, request.body or None, headers)
                response = connection.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                self.local.connection = None
                continue
            kept = tuple((name, value) for name, value in response.getheaders() if name.lower() in returned)
            return Answer(response.status, body, response.getheader("content-type", ""), kept)
        return Answer(502, b"")
