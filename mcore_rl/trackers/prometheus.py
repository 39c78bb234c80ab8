"""An endpoint that Prometheus scrapes: the newest step's metrics, in its text format."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping

from mcore_rl.small_server import SmallHandler, SmallServer
from mcore_rl.trackers.services import TrackedRun

PATH = "/metrics"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Prometheus:
    """See TrackingService; what is asked between two steps is answered with the last one."""

    def __init__(self, run: TrackedRun) -> None:
        """Listen at `run.prometheus`. Raises OSError where that is taken or of another machine."""
        host, _, port = run.prometheus.rpartition(":")
        self._labels = f'{{run="{_label(run.name)}",id="{_label(run.id[:8])}"}}'
        self._text = b""
        service = self

        class Handler(SmallHandler):
            def do_GET(self) -> None:
                if self.path.partition("?")[0] != PATH:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(service._text)))
                self.end_headers()
                self.wfile.write(service._text)

        self._server = SmallServer((host.strip("[]"), int(port)), Handler)
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="mcore_rl-prometheus", daemon=True
        )
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See TrackingService."""
        found = {name_of(name): value for name, value in metrics.items()} | {"mcore_rl_step": float(step)}
        lines = [f"# TYPE {name} gauge\n{name}{self._labels} {value!r}\n" for name, value in found.items()]
        self._text = "".join(lines).encode()

    def close(self, *, failed: bool) -> None:
        """See TrackingService."""
        self._server.shutdown()
        self._server.server_close()


def name_of(metric: str) -> str:
    """`reward/mean` -> `mcore_rl_reward_mean`, as names of Prometheus are."""
    return "mcore_rl_" + re.sub(r"[^A-Za-z0-9_]", "_", metric)


def _label(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
