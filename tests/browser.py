"""A real browser without a window: chromium, spoken to through a pipe, so that no port is open."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DEADLINE = 60.0


class Browser:
    """One page of a running chromium."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._rest, self._number, self._events = b"", 0, []
        self.errors: list[str] = []
        """what the page's scripts complained of"""
        target = self.ask("Target.createTarget", session=False, url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", session=False, targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, *, session: bool = True, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        self._number += 1
        call = {"id": self._number, "method": method, "params": params}
        os.write(
            self._writing,
            json.dumps(call | ({"sessionId": self._session} if session else {})).encode() + b"\0",
        )
        while True:
            message = self._next()
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def open(self, url: str) -> float:
        """Load a page to its end; the milliseconds from its start to its load event."""
        self._events.clear()
        self.ask("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._events:
            self._next()
        entry = "performance.getEntriesByType('navigation')[0].loadEventEnd"
        self.until(f"{entry} > 0")
        return float(self.run(entry))

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until an expression is true in whatever page is there. Raises TimeoutError."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):  # between two pages
                if self.run(condition):
                    return
            time.sleep(0.05)
        raise TimeoutError(condition)

    def show(self, width: int, height: int, *, dark: bool = False, scale: float = 1.0) -> None:
        """The size of the window, and whether it prefers dark colours."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path, clip: dict[str, float] | None = None) -> None:
        """What is shown, or all of `clip` (x, y, width, height), as a PNG file."""
        more = {"clip": {"scale": 1.0, **clip}, "captureBeyondViewport": True} if clip else {}
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png", **more)["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._reading], [], [], DEADLINE)[0]:
                raise TimeoutError(f"chromium is silent for {DEADLINE} s")
            data = os.read(self._reading, 1 << 20)
            if not data:
                raise RuntimeError("chromium has ended")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        method = message.get("method")
        if method:
            self._events.append(method)
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(message["params"]["exceptionDetails"]))
        if method == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.errors.append(str(message["params"]["entry"]))
        return message


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A chromium with an empty profile in that directory; it ends with the block."""
    assert CHROMIUM is not None
    to_child, from_here = os.pipe()
    to_here, from_child = os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"]
    flags += ["--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"]
    # chromium reads commands from descriptor 3 and answers on 4
    line = f'exec "$0" "$@" 3<&{to_child} 4>&{from_child}'
    process = subprocess.Popen(
        ["/bin/bash", "-c", line, CHROMIUM, *flags],
        pass_fds=(to_child, from_child),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_child)
    os.close(from_child)
    try:
        yield Browser(to_here, from_here)
    finally:
        os.close(from_here)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to_here)
