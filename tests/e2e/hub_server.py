"""A hub on a port of this machine, with one dataset: as much of its protocol as `datasets` asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(name: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve a dataset.

    Args:
        name: "owner/name"; anything else is not found.
        files: path -> content.

    Yields:
        the endpoint, and the requests so far.
    """
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, found: object, status: int = 200) -> None:
            self._send(status, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            seen.append(f"{self.command} {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": _hash(content)}
                for file, content in files.items()
            ]
            if path.startswith(f"/api/datasets/{name}"):
                rest = path.removeprefix(f"/api/datasets/{name}").strip("/").split("/")
                if rest[0] == "paths-info":
                    given = parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
                    self._json([entry for entry in entries if entry["path"] in given])
                elif rest[0] == "tree":
                    within = "".join(f"{part}/" for part in rest[2:])
                    found = [entry for entry in entries if str(entry["path"]).startswith(within)]
                    deeper = {str(entry["path"])[len(within) :].partition("/")[0] for entry in found}
                    deeper -= {str(entry["path"])[len(within) :] for entry in found}
                    folders = [{"type": "directory", "path": within + one, "size": 0, "oid": COMMIT} for one in deeper]
                    self._json([*found, *folders])
                elif rest[0] in ("", "revision"):
                    siblings = [{"rfilename": file} for file in files]
                    self._json({"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
                else:
                    self._json({"error": "no such thing"}, 404)
                return
            start = f"/datasets/{name}/resolve/"
            file = path.removeprefix(start).partition("/")[2]
            if path.startswith(start) and file in files:
                headers = {"ETag": f'"{_hash(files[file])}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                self._send(200, files[file], headers)
            else:
                code = "EntryNotFound" if path.startswith(start) else "RepoNotFound"
                self._send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

        do_GET = do_HEAD = do_POST = _answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _hash(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
