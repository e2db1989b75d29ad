"""Connections that do not do their part: silent, slow, too many, and with bodies that are too large."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from serving import ScriptedLoader, StatusServer, until_met
from splitlearn_serve import app, connections, guard
from splitlearn_serve.connections import connection_limit

#: Seconds of patience in tests whose subject is that it ends.
SOON = 0.2
#: Seconds after which a test has failed rather than been slow.
LIMIT = 30
LARGE = 8 * 2**20
HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"

Serve = Callable[..., StatusServer]


@pytest.fixture
def loader() -> ScriptedLoader:
    return ScriptedLoader()


@pytest.fixture
def serve(loader: ScriptedLoader) -> Iterator[Serve]:
    """Return a function that starts a server for as long as the test runs."""
    with ExitStack() as stack:

        def serve(**options: Any) -> StatusServer:
            return stack.enter_context(StatusServer(**{"loader": loader, **options}))

        yield serve


@pytest.fixture
def connect() -> Iterator[Callable[..., socket.socket]]:
    """Return a function that connects to a server and sends something."""
    with ExitStack() as stack:

        def connect(server: StatusServer, data: bytes = b"") -> socket.socket:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT))
            client.sendall(data)
            return client

        yield connect


Connect = Callable[..., socket.socket]


def rest(client: socket.socket) -> bytes:
    """Return all that comes until the server closes; a reset is an end, too."""
    data = b""
    with suppress(ConnectionError):
        while chunk := client.recv(65536):
            data += chunk
    return data


def until(client: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        chunk = client.recv(65536)
        assert chunk, data
        data += chunk
    return data


class TestTime:
    @pytest.mark.parametrize(
        "said",
        [b"", b"GET", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"GET /health/live HTTP/1.1\r\n" + HEAD + b"\r\n"],
        ids=["nothing", "a word", "half a header", "one request and no other"],
    )
    def test_no_request(self, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
        """A client that makes no request is closed, at first and after an answer."""
        monkeypatch.setattr(connections, "REQUEST_TIMEOUT", SOON)

        data = rest(connect(serve(), said))

        assert data.startswith(b"HTTP/1.1 200") is said.endswith(b"\r\n\r\n")

    def test_a_byte_at_a_time(self, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
        """The time is for all of the headers, and does not begin again with each byte."""
        monkeypatch.setattr(connections, "REQUEST_TIMEOUT", SOON)
        client = connect(serve(), b"GET / HTTP/1.1\r\nX: ")

        with pytest.raises(ConnectionError):  # noqa: PT012  # which byte it is, is all the same
            while not select.select([client], [], [], SOON / 10)[0]:
                client.sendall(b"x")
            client.recv(1)
            while True:
                client.sendall(b"x")

    def test_a_request_is_no_silence(self, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who waits for an answer, or watches, is not closed."""
        monkeypatch.setattr(connections, "REQUEST_TIMEOUT", SOON)
        server = serve()
        watcher = connect(server, b"GET /api/events HTTP/1.1\r\n" + HEAD + b"\r\n")
        until(watcher, b"event: snapshot")

        rest(connect(server))  # as long as it takes to be closed

        server.end()
        assert rest(watcher).endswith(b"0\r\n\r\n")

    def test_unread_answers(self, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
        """A client that asks and asks and reads nothing is closed, and others are answered meanwhile."""
        monkeypatch.setattr(connections, "READING_TIMEOUT", SOON)
        server = serve()
        client = connect(server)
        client.setblocking(False)
        asked = b"GET / HTTP/1.1\r\n" + HEAD + b"\r\n"
        closed = select.poll()
        closed.register(client, select.POLLOUT)

        with pytest.raises(ConnectionError):  # noqa: PT012  # the end comes with any of these
            while True:
                (_, happened), *_ = closed.poll(LIMIT * 1000)
                if happened & select.POLLOUT and not happened & (select.POLLHUP | select.POLLERR):
                    try:
                        client.send(asked * 100)
                    except BlockingIOError:
                        continue
                    if not select.select([], [client], [], 0)[1]:
                        closed.modify(client, select.POLLHUP | select.POLLERR)
                else:
                    raise ConnectionResetError
        assert server.request("GET", "/health/live").status == 200

    def test_a_body_that_does_not_come(self, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
        """The client gets an error, and the connection is closed."""
        monkeypatch.setattr(app, "_BODY_TIMEOUT", SOON)

        answer = rest(connect(serve(), b"POST /api/models HTTP/1.1\r\n" + HEAD + b"Content-Length: 9\r\n\r\n{"))

        assert answer.startswith(b"HTTP/1.1 408")
        assert b"connection: close" in answer.lower()


class TestNumber:
    def test_the_idlest_goes(self, serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
        """However many say nothing: health is answered, the eldest are closed, the newest stay; one line in the log."""
        server = serve(connections=8)
        idle = [connect(server, b"GET / HTTP/1.1\r\nX: ") for _ in range(100)]

        for _ in range(20):
            assert server.request("GET", "/health/live").status == 200
        for client in idle[:80]:
            assert rest(client) == b""
        idle[-1].sendall(b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert rest(idle[-1]).startswith(b"HTTP/1.1 200")
        assert len([r for r in caplog.records if "connections" in r.getMessage()]) == 1

    def test_health_during_long_requests(self, serve: Serve, connect: Connect) -> None:
        """At the limit of requests, others are refused for now, and health checks are answered."""
        server = serve(connections=8)
        head = b"POST /api/models HTTP/1.1\r\n" + HEAD + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n"
        busy = [connect(server, head) for _ in range(6)]
        for client in busy:
            until(client, b"100 Continue\r\n\r\n")

        refused = server.request("GET", "/api/models")

        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        assert refused.headers["x-content-type-options"] == "nosniff"
        assert refused.json["error"]["message"]
        for path in ("/health/live", "/health/ready"):
            assert server.request("GET", path).status == 200
            assert server.request("POST", path).status == 503
        for client in busy:
            client.sendall(b'{"a": 1} ')
            assert until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 422")
        assert server.request("GET", "/api/models").status == 200

    def test_unread_answers_make_room(self, serve: Serve, connect: Connect) -> None:
        """A client that does not read its answers is as good as one that asks nothing."""
        server = serve(connections=4)
        for _ in range(6):
            client = connect(server)
            client.setblocking(False)
            with suppress(ConnectionError, BlockingIOError):
                while select.select([], [client], [], SOON)[1]:
                    client.send(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500)

        assert server.request("GET", "/health/live").status == 200

    def test_clients_that_leave_are_not_waited_for(
        self, serve: Serve, connect: Connect, loader: ScriptedLoader, llama: Any
    ) -> None:
        """Loads that stand still keep no request of clients that have gone; the loads themselves go on."""
        names = [f"trunk{number}" for number in range(10)]
        loader.hold(*names)
        server, clients = serve(http={"model_roots": ["/"]}), []
        for name in names:
            config = {
                "model_id": name, "model_type": "llama", "model_path": "/x", "component": "trunk",
                "split_points": [1, 2],
            }  # fmt: skip
            body = json.dumps(config).encode()
            head = b"POST /api/models?wait=true HTTP/1.1\r\n" + HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
            clients.append(connect(server, head + body))
        server.wait_until(lambda manager: len(manager.list_models()) == len(names))
        assert len(server.requests) == len(names)

        for client in clients:
            client.close()

        async def answered(manager: Any) -> None:
            await until_met(lambda: not server.requests)

        server.run(answered)
        assert all(model["status"] != "failed" for model in server.get("/api/models")["models"])

    def test_the_limit_leaves_descriptors(self) -> None:
        """There are fewer connections than descriptors."""
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert 16 <= connection_limit() < max(limit, 17)


class TestLargeBodies:
    @pytest.mark.parametrize(
        "path", ["/api/models", "/api/models/x/load", "/api/models/x/reload", "/api/models/x/cancel"]
    )
    @pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
    def test_the_answer_arrives(self, serve: Serve, path: str, chunked: bool) -> None:
        """A client that sends all before it reads gets its 413, and no reset."""
        with serve().connection() as connection:
            body: Any = (b" " * 65536 for _ in range(LARGE // 65536)) if chunked else b" " * LARGE
            kind = {"Transfer-Encoding": "chunked"} if chunked else {}
            headers = {"Content-Type": "application/json", **kind}
            connection.request("POST", path, body, headers, encode_chunked=chunked)

            answer = connection.getresponse()

            assert answer.status == 413
            assert "64 KiB" in json.loads(answer.read())["error"]["message"]

    def test_it_comes_before_the_body(self, serve: Serve, connect: Connect) -> None:
        """A length alone is enough: the client need not send, and is not asked to send, the body."""
        head = b"POST /api/models HTTP/1.1\r\n" + HEAD + b"Content-Length: 9999999\r\n"

        assert until(connect(serve(), head + b"\r\n"), b"}}").startswith(b"HTTP/1.1 413")
        waiting = rest(connect(serve(), head + b"Expect: 100-continue\r\n\r\n"))
        assert waiting.startswith(b"HTTP/1.1 413")

    @pytest.mark.parametrize(
        ("method", "path", "headers", "status"),
        [
            ("POST", "/api/models", {"Content-Type": "text/plain"}, 415),
            ("POST", "/api/models", {"Host": "evil.example"}, 421),
            ("POST", "/nothing", {}, 404),
            ("PUT", "/api/models", {}, 405),
            ("DELETE", "/api/models/none", {}, 413),
        ],
    )
    def test_other_refusals_arrive_too(
        self, serve: Serve, method: str, path: str, headers: dict[str, str], status: int
    ) -> None:
        """Whatever is refused before its body was read, even where the client will close then."""
        with serve().connection() as connection:
            sent = {"Content-Type": "application/json", "Connection": "close", **headers}
            connection.request(method, path, b" " * LARGE, sent)

            answer = connection.getresponse()

            assert answer.status == status
            assert json.loads(answer.read())["error"]["message"]

    def test_not_for_ever(self, serve: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
        """A body that does not end is not read to its end."""
        monkeypatch.setattr(guard, "_LINGER", SOON)

        answer = rest(connect(serve(), b"POST /api/models HTTP/1.1\r\n" + HEAD + b"Content-Length: 9999999\r\n\r\n{"))

        assert answer.startswith(b"HTTP/1.1 413")


class TestEnd:
    @pytest.mark.parametrize(
        "said",
        [
            b"",
            b"GET / HTTP/1.1\r\nX: ",
            b"\xff\xff\xff\r\n\r\n",
            b"POST /api/models HTTP/1.1\r\n" + HEAD + b"Content-Length: 9\r\n\r\n{",
            b"POST /api/models HTTP/1.1\r\n" + HEAD + b"Content-Length: 9999999\r\n\r\n{",
            b"GET /api/events HTTP/1.1\r\n" + HEAD + b"\r\n",
            (b"GET / HTTP/1.1\r\n" + HEAD + b"\r\n") * 2000,
        ],
        ids=["silent", "half a header", "no HTTP", "half a body", "a large body", "watching", "not reading"],
    )
    def test_nothing_is_logged(
        self, serve: Serve, connect: Connect, caplog: pytest.LogCaptureFixture, said: bytes
    ) -> None:
        """Whatever clients are in the middle of, an end is an end, and no error."""
        server = serve()
        for _ in range(3):
            connect(server, said)
        assert server.request("GET", "/health/live").status == 200

        server.end()

        assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_requests_that_are_none(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are refused with 400, are not logged, and affect no other client."""
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT", SOON)
    server = serve()
    for said in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2**20 + b"\r\n\r\n",
        b"GET /" + b"x" * 2**20 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /api/models HTTP/1.1\r\n" + HEAD + b"Content-Length: -1\r\n\r\n",
        b"POST /api/models HTTP/1.1\r\n" + HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /api/models HTTP/1.1\r\n" + HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST /api/models HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ):
        client = socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT)
        with client:
            with suppress(ConnectionError):  # it had seen enough
                client.sendall(said)
            answer = rest(client)
        assert answer[:12] in (b"HTTP/1.1 400", b""), said[:80]
    for path in ("/api/models/%ff%00", "/api/models/%0d%0aX:y", "/api/models/<b>", "/api/models?wait=%ff"):
        assert server.request("GET", path).status in (200, 404)
    for body in (b'{"model_id": "a", "model_id": "b"}', b'{"load_threads": ' + b"9" * 5000 + b"}"):
        assert server.request("POST", "/api/models", body).status == 400
    for body in (
        b'{"keep_alive": NaN}',
        b'{"max_memory_mb": 1e999}',
        b'{"\\ud800": "\\ud800"}',
        b'{"model_id": "\\u0000<script>"}',
    ):
        answer = server.request("POST", "/api/models", body)
        assert answer.status == 422
        assert len(answer.body) < 5000
    assert server.request("DELETE", "/api/models/none?timeout=1e308").status == 404
    assert server.request("GET", "/health/live").status == 200
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
