"""Requests that are too large or too slow, and ports."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from fourbit.errors import InputError
from fourbit.serve.guard import Guard
from fourbit.serve.run import address_of, is_local, listen


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    await PlainTextResponse(str(len(body)))(scope, receive, send)


def request(pieces: list[bytes], *, said: int | None = None, pause_s: float = 0.0) -> tuple[int, bytes, dict[str, str]]:
    """A body in pieces through a guard that takes ten bytes and 50 ms; returns status, body and headers."""
    left = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    left.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[Any] = []

    async def receive() -> Message:
        await asyncio.sleep(pause_s)
        return left.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [] if said is None else [(b"content-length", str(said).encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    asyncio.run(Guard(echo, largest_body=10, body_s=0.05)(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], sent[1]["body"], found


@pytest.mark.parametrize(
    ("pieces", "said", "pause_s", "status"),
    [
        ([], None, 0.0, 200),
        ([b"12345", b"67890"], 10, 0.0, 200),
        ([b"12345", b"67890", b"1"], None, 0.0, 413),
        ([], 11, 0.0, 413),  # it is not even read
        ([b"1"] * 10, None, 0.03, 408),
    ],
)
def test_a_request_is_whole_small_and_soon(pieces: list[bytes], said: int | None, pause_s: float, status: int) -> None:
    got, body, headers = request(pieces, said=said, pause_s=pause_s)
    assert got == status
    assert "default-src 'none'" in headers["content-security-policy"]
    if status == 200:
        assert int(body) == sum(map(len, pieces))
    else:
        assert headers["connection"] == "close"


def test_a_port_and_its_address() -> None:
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert address_of(listening) == f"http://127.0.0.1:{port}"
        assert is_local(listening)
        with pytest.raises(InputError, match=f"Port {port} of 127.0.0.1 is taken"):
            listen("127.0.0.1", port)
    with listen("0.0.0.0", 0) as listening:
        assert address_of(listening).startswith(f"http://{socket.gethostname()}:")
        assert not is_local(listening)
    with pytest.raises(InputError, match="no address of this machine"):
        listen("192.0.2.1", 0)
