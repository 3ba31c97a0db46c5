"""Serves a page of `mvbert export --page` on this computer alone.

Answers for the files that the page lists, and for nothing else: no other file of the folder, no
folder above it, no listing. It listens on the loopback address, and refuses requests that name
another host, which a foreign page could send here by a name of its own (DNS rebinding).
"""

from __future__ import annotations

import contextlib
import sys
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mvbert.errors import InputError
from mvbert.files import Json, read_json_object
from mvbert.progress import Progress

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
}


def page_files(site: Path) -> dict[str, Path]:
    """The files of a page by the path of their address.

    Raises:
        InputError: the folder is no page, lacks a file, or a file is a link that leads out of it.
    """
    listing = site / "page.json"
    if not listing.is_file():
        raise InputError(
            f"{site} is not a page (it has no page.json); write one with "
            f"`mvbert export MODEL --page -o FOLDER`"
        )
    names = read_json_object(listing).get("files")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{listing}: files must be a list of names")
    files = {}
    for name in names:
        path = site / name
        if not path.resolve().is_relative_to(site.resolve()):
            raise InputError(f"{listing}: the file {name!r} is outside {site}")
        if not path.is_file():
            raise InputError(f"{site} has no {name}; export the page again")
        files[f"/{name}"] = path
    if "/index.html" in files:
        files["/"] = files["/index.html"]
    return files


def make_server(site: Path, port: int) -> ThreadingHTTPServer:
    """A server of a page on the loopback address; port 0 is any free one.

    Raises:
        InputError: the folder is no page, or the port cannot be had.
    """
    files = page_files(site)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, body: bool) -> None:
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            path = files.get(self.path.split("?", 1)[0].split("#", 1)[0])
            if host not in ("localhost", "127.0.0.1"):
                self._send(403, b"this server answers for localhost alone\n", ".txt", body)
            elif path is None:
                self._send(404, b"the page has no such file\n", ".txt", body)
            else:
                self._send(200, path.read_bytes(), path.suffix, body)

        def _send(self, status: int, data: bytes, suffix: str, body: bool) -> None:
            self.send_response(status)
            self.send_header("Content-Type", TYPES.get(suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-cache")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on port {port}: {reason}; give another --port") from None
    server.daemon_threads = True
    return server


def run_serve(site: Path, port: int) -> dict[str, Json]:
    """Serves a page until it is interrupted, and opens it in a browser if a person is there."""
    with make_server(site, port) as server:
        address = f"http://localhost:{server.server_port}/"
        Progress("export").note(f"{site}: {address} (Ctrl-C ends it)")
        if sys.stderr.isatty():
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return {"served": str(site), "address": address}
