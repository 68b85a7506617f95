"""What every request is held to, and what every answer carries."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["BODY_S", "LARGEST_BODY", "Guard"]

LARGEST_BODY = 128 * 1024
"""Bytes of a request; the longest thing that anybody sends is a prompt."""

BODY_S = 20.0
"""Within which a request must be there."""

_HEADERS = {
    # Only what comes from here is run or shown, nobody frames the page, and it sends its address to nobody.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "x-robots-tag": "noindex, nofollow",
    "cache-control": "no-store",
}
_ENCODED = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]


class Guard:
    """Reads a request whole, if it is neither too large nor too slow, and puts headers on the answer.

    Args:
        app: what answers.
        largest_body, body_s: see `LARGEST_BODY`, `BODY_S`.
    """

    def __init__(self, app: ASGIApp, *, largest_body: int = LARGEST_BODY, body_s: float = BODY_S) -> None:
        self._app, self._largest, self._body_s = app, largest_body, body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_ENCODED]
            await send(message)

        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._body_s)
        except asyncio.TimeoutError:
            await _refuse(408, "The request took too long.")(scope, receive, send_with_headers)
            return
        if body is None:
            sentence = f"The request is larger than {self._largest:,} bytes."
            await _refuse(413, sentence)(scope, receive, send_with_headers)
            return
        given: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return given.pop() if given else await receive()

        await self._app(scope, receive_again, send_with_headers)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None where it is too large."""
        said = dict(scope["headers"]).get(b"content-length", b"")
        if said.isdigit() and int(said) > self._largest:
            return None
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":  # gone
                return body
            body += bytes(message.get("body", b""))
            if len(body) > self._largest:
                return None
            if not message.get("more_body", False):
                return body


def _refuse(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status, headers={"connection": "close"})
