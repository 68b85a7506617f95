"""A judge at the wire: an OpenAI-compatible HTTP server that can do everything a server can do wrong.

As a program it serves until it is killed: `judge_server.py PORT PAID_LOG FAULT_SHARE`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("limit", "wait", "date", "error", "html", "no choices", "half", "drop", "slow", "no message", "not a reply")


def verdict_of(prompt: str) -> str:
    """What this judge says: it is a judge of taste, but always of the same."""
    draw = random.Random(prompt)
    if "Scores: X Y" in prompt:
        return f"Both are answers.\nScores: {draw.randint(0, 10)} {draw.randint(0, 20) / 2:g}"
    return f"Both are answers.\nVerdict: {draw.choice('112233')}"


class JudgeServer:
    """Serves in threads of this process.

    Attributes:
        paid: how many whole replies each prompt got: what its owner would have been charged for.
        seen: how many requests came, refused ones included.
        bodies, headers: of these.
        behave: (number of the request, its prompt) -> "ok", a fault, or (status, JSON, headers).
        answer: prompt -> reply.
        usage: prompt, reply -> the tokens to charge; None: no usage is told.
    """

    def __init__(self, port: int = 0) -> None:
        self.paid: Counter[str] = Counter()
        self.seen = 0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.behave: Callable[[int, str], Any] = lambda number, prompt: "ok"
        self.answer: Callable[[str], str] = verdict_of
        self.usage: Callable[[str, str], dict[str, int] | None] = lambda prompt, reply: {
            "prompt_tokens": len(prompt) // 4,
            "completion_tokens": len(reply) // 4,
        }
        self.on_paid: Callable[[str], None] = lambda prompt: None
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self.port = port
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Listen, on the port of before after a `stop`."""
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                judge.handle(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: Any) -> None:  # the client went away
                pass

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._alive = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Die: nobody listens any more, and what was being answered is not."""
        self._alive = False
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def handle(self, request: Any) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with self._lock:
            number, self.seen = self.seen, self.seen + 1
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in request.headers.items()})
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self._respond(request, self.behave(number, prompt), prompt)
        finally:
            with self._lock:
                self._at_once -= 1

    def _respond(self, request: Any, what: Any, prompt: str) -> None:
        if isinstance(what, tuple):
            _send(request, what[0], json.dumps(what[1]).encode(), what[2] if len(what) > 2 else {})
        elif what == "limit":
            _send(request, 429, b'{"error": {"message": "slow down"}}')
        elif what == "wait":
            _send(request, 429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.05"})
        elif what == "date":
            _send(request, 503, b"busy", {"Retry-After": formatdate(time.time(), usegmt=True)})
        elif what == "error":
            _send(request, 500, b"Traceback (most recent call last)")
        elif what == "html":
            _send(request, 200, b"<html>It works!</html>", {"Content-Type": "text/html"})
        elif what == "no choices":
            _send(request, 200, b'{"choices": []}')
        elif what == "no message":
            _send(request, 200, b'{"choices": [{"finish_reason": "stop"}]}')
        elif what == "not a reply":
            _send(request, 200, b'["choices"]')
        elif what == "half":
            _send(request, 200, b'{"choices": [{"message": {"cont', {"Content-Length": "500"})
            _break(request)
        elif what == "drop":
            _break(request)
        elif what == "hang":
            time.sleep(1.0)
            _break(request)
        else:
            if what == "slow":
                time.sleep(0.1)
            self._complete(request, prompt)

    def _complete(self, request: Any, prompt: str) -> None:
        reply = self.answer(prompt)
        found: dict[str, Any] = {
            "choices": [{"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}]
        }
        if (usage := self.usage(prompt, reply)) is not None:
            found["usage"] = usage
        if not self._alive:
            _break(request)
            return
        key = hashlib.sha256(prompt.encode()).hexdigest()
        with self._lock:  # the bill is written before the reply is sent
            self.paid[key] += 1
            self.on_paid(key)
        _send(request, 200, json.dumps(found).encode())


def _send(request: Any, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    request.send_response(status)
    for name, value in {
        "Content-Length": str(len(body)),
        "Content-Type": "application/json",
        **(headers or {}),
    }.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)
    request.wfile.flush()


def _break(request: Any) -> None:
    request.close_connection = True
    request.connection.shutdown(socket.SHUT_RDWR)


def faulty(share: float, seed: int = 0) -> Callable[[int, str], str]:
    """A behaviour: so large a share of the requests meets some fault, drawn by their number."""

    def behave(number: int, prompt: str) -> str:
        draw = random.Random(seed * 1_000_003 + number)
        return draw.choice(FAULTS) if draw.random() < share else "ok"

    return behave


def main() -> None:
    port, log, share = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    server = JudgeServer(port)
    file = log.open("a")

    def write(key: str) -> None:
        file.write(key + "\n")
        file.flush()

    server.on_paid = write
    behave = faulty(share, seed=os.getpid())

    def slowly(number: int, prompt: str) -> str:
        time.sleep(0.02)
        return behave(number, prompt)

    server.behave = slowly
    print(server.port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
