"""Connections that dribble their headers, that say nothing, and too many of them."""

from __future__ import annotations

import contextlib
import json
import socket
import time

import pytest

from ringspan.deploy.serve.limits import HttpLimits

HEADER_S, IDLE_S = 0.6, 1.2
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def narrow(opened, tmp_path_factory: pytest.TempPathFactory):
    limits = HttpLimits(header_timeout_s=HEADER_S, idle_s=IDLE_S, connections=8, body_timeout_s=5.0)
    folder = tmp_path_factory.mktemp("narrow")
    with opened("random:tiny", folder, limits=limits, served_model_name="tiny") as server:
        yield server


def connect(server) -> socket.socket:
    return socket.create_connection(server.address, timeout=10.0)


def rest(connection: socket.socket) -> bytes:
    """Until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def reply(connection: socket.socket) -> bytes:
    """One whole answer of `/health`."""
    got = b""
    while not got.endswith(b"}"):
        part = connection.recv(1 << 16)
        assert part, f"closed behind {got!r}"
        got += part
    return got


def dribble(connection: socket.socket, size: int) -> None:
    for _ in range(size):
        connection.sendall(b"x")
        time.sleep(0.05)


def test_headers_that_dribble_are_cut_off_whatever_comes_of_them(narrow) -> None:
    for before in (b"", GET):  # a first request, and one behind another
        with connect(narrow) as connection:
            if before:
                connection.sendall(before)
                assert reply(connection).startswith(b"HTTP/1.1 200")
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                for byte in GET[:-4] + b"\r\nA: " + b"x" * 100:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)
                    if time.monotonic() - began > 2 * HEADER_S:
                        break
            answer = rest(connection)
        assert time.monotonic() - began < 10 * HEADER_S
        head, _, body = answer.partition(b"\r\n\r\n")
        if answer:  # a reset may have taken it
            assert head.startswith(b"HTTP/1.1 408 Request Timeout")
            assert b"connection: close" in head
            error = json.loads(body)["error"]
            assert error["code"] == "timeout"
            assert f"{HEADER_S:g} s" in error["message"]
        with connect(narrow) as again:
            again.sendall(GET)
            assert reply(again).startswith(b"HTTP/1.1 200")


def test_a_408_is_read_by_a_client_that_waits(narrow) -> None:
    with connect(narrow) as connection:
        connection.sendall(GET[:20])
        assert rest(connection).startswith(b"HTTP/1.1 408")


def test_a_connection_that_says_nothing_ends(narrow) -> None:
    with connect(narrow) as connection:
        began = time.monotonic()
        assert rest(connection) == b""
        assert time.monotonic() - began >= 0.9 * HEADER_S
    with connect(narrow) as connection:
        connection.sendall(GET)
        reply(connection)
        began = time.monotonic()
        assert rest(connection) == b""
        assert time.monotonic() - began >= 0.9 * IDLE_S


def test_a_body_behind_a_refusal_does_not_hold_the_connection(narrow) -> None:
    head = b"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with connect(narrow) as connection:
        connection.sendall(head)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 404")
        with pytest.raises(ConnectionError):  # long before all of it is sent
            dribble(connection, round(20 * HEADER_S / 0.05))


def test_idle_connections_give_way_and_busy_ones_do_not(narrow) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(narrow)) for _ in range(12)]
        with connect(narrow) as asking:
            asking.sendall(GET)
            assert reply(asking).startswith(b"HTTP/1.1 200")
        assert rest(idle[0]) == b""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(narrow)) for _ in range(8)]
        for connection in busy:
            connection.sendall(head + b"Content-Length: 30\r\n\r\n")
        time.sleep(0.3)  # the server has read them: a body may take 5 s
        with connect(narrow) as more:
            answer = rest(more)
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable")
        assert b"retry-after: 1" in answer
        for connection in busy:
            connection.sendall(b'{"prompt":[5,9],"max_tokens":2}'[:30])
        assert all(connection.recv(64).startswith(b"HTTP/1.1 4") for connection in busy)
