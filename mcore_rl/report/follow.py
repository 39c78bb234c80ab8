"""`mcore-rl report --follow`: the page of runs that go on, served on this machine alone, until Ctrl-C.

Two addresses are answered, `/` and `/version`, and nothing of a request is ever a path. A page in a browser
asks for the version every few seconds, and loads itself anew where that has changed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from mcore_rl.errors import ConfigError, DataError
from mcore_rl.log import EVENTS, METRICS
from mcore_rl.report.page import page_of
from mcore_rl.small_server import SmallHandler, SmallServer
from mcore_rl.terminal import escaped

LOOPBACK = "127.0.0.1"
_WATCHED = (METRICS, EVENTS, "resolved.toml", "rollouts", "samples", "evaluations")


class Page:
    """The text of the page, made anew where the files of its runs have changed."""

    def __init__(self, run_dirs: Sequence[Path], samples: Sequence[str] = ()) -> None:
        self._run_dirs, self._samples = run_dirs, samples
        self._lock = threading.Lock()
        self._made: tuple[str, bytes] = ("", b"")

    def version(self) -> str:
        """What differs where there is something new; read from sizes and times of the runs' files."""
        found = []
        for path in (run / name for run in self._run_dirs for name in _WATCHED):
            with suppress(OSError):
                state = path.stat()
                found.append(f"{state.st_mtime_ns:x}.{state.st_size:x}")
                continue
            found.append("-")
        return "_".join(found)

    def content(self) -> bytes:
        """The page in UTF-8; before a run's first step one that says so, which asks again."""
        with self._lock:
            version = self.version()
            if version != self._made[0]:
                self._made = (version, self._text(version).encode("utf-8", errors="replace"))
            return self._made[1]

    def _text(self, version: str) -> str:
        try:
            page = page_of(self._run_dirs, self._samples, follows=True)
        except DataError as error:
            page = _waiting(error)
        return page.replace("<html ", f'<html data-version="{version}" ', 1)


def _waiting(error: DataError) -> str:
    script = files("mcore_rl.report").joinpath("follow.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>mcore_rl report</title></head>'
        f"<body><p>There is no report yet; this page looks again by itself.</p><pre>{escape(escaped(error))}"
        f"</pre><script>{script}</script></body></html>\n"
    )


class _PageServer(SmallServer):
    allow_reuse_address = False

    def __init__(self, port: int, page: Page) -> None:
        super().__init__((LOOPBACK, port), partial(_Handler, page))


class _Handler(SmallHandler):
    def __init__(self, page: Page, *arguments: Any) -> None:
        self._page = page
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answer the page or its version; by a foreign name, as of another site's script, nothing."""
        assert isinstance(self.server, _PageServer)
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{LOOPBACK}:{port}", f"localhost:{port}"):
            return self.send_error(403, "ask by 127.0.0.1")
        if self.path == "/":
            return self._answer(self._page.content(), "text/html; charset=utf-8")
        if self.path == "/version":
            return self._answer(self._page.version().encode(), "text/plain")
        self.send_error(404)

    do_HEAD = do_GET

    def _answer(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serving(run_dirs: Sequence[Path], samples: Sequence[str] = (), port: int = 0) -> Iterator[str]:
    """The address at which the page of the runs is served.

    Args:
        port: 0 takes a free one.

    Raises:
        ConfigError: the port is taken, or not for everybody.
        DataError: a run directory is not there.
    """
    for run in run_dirs:
        if not run.is_dir():
            raise DataError(f"{run}: no such directory; name that of a run, which it makes at its start")
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: give one from 1 to 65535, or none for a free one")
    try:
        server = _PageServer(port, Page(run_dirs, samples))
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror}; give another, or none for a free one") from None
    thread = threading.Thread(target=server.serve_forever, name="mcore_rl-report", daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


def wait_to_be_ended() -> None:
    """Until Ctrl-C or SIGTERM."""
    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        with suppress(KeyboardInterrupt):
            ended.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
