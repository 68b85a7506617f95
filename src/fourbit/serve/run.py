"""Listening: the port, the addresses that reach it, and an end without noise."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket

import uvicorn
from starlette.types import ASGIApp

from fourbit.errors import InputError

__all__ = ["address_of", "is_local", "listen", "serve"]

CONNECTIONS = 256
"""At a time; more are refused with 503."""


def listen(host: str, port: int) -> socket.socket:
    """Take a port, before anything is promised about it.

    Args:
        port: 0 takes any that is free.

    Raises:
        InputError: it is taken, or there is no such host here.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port is {port}; it must be between 0 and 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise InputError(f"--host is {host!r}, which is no address; 127.0.0.1 is this machine alone.") from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"Port {port} of {host} is taken; choose another with --port, or 0 for any.") from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise InputError(f"Port {port} is not for everybody; choose one above 1023 with --port.") from None
        raise InputError(f"--host is {host!r}, which is no address of this machine ({error.strerror}).") from None
    return found


def address_of(listening: socket.socket) -> str:
    """The URL under which it is reached, from this machine or, where it listens to all, from its network."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(listening: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def serve(app: ASGIApp, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C, and then only those that are under way."""
    config = uvicorn.Config(
        app,
        log_level="error",  # that somebody sends what is no HTTP is no news
        access_log=False,  # which would hold the tokens
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=5,
        server_header=False,
        ws="none",
        lifespan="on",
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
