"""A small HTTP server beside a run: so many connections at a time, none of which can stay for ever."""

from __future__ import annotations

import socket
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REQUEST_SECONDS = 10.0
"""how long a connection may be silent, for the `timeout` of a handler"""
WHOLE_SECONDS = 30.0
"""after which a connection is ended where its place is wanted: one letter now and then is no silence"""
MOST_CONNECTIONS = 32
"""at the same time; others are closed unanswered"""


class SmallServer(ThreadingHTTPServer):
    """Answers each connection in a thread, of which there are at most MOST_CONNECTIONS."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: Any) -> None:
        """Raises OSError where the address is taken or of another machine; `handler`: makes a handler."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._lock = threading.Lock()
        self._open: dict[Any, float] = {}
        """connection -> when it came"""
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for it, where there is room."""
        now = time.monotonic()
        with self._lock:
            has_room = len(self._open) < MOST_CONNECTIONS
            if has_room:
                self._open[request] = now
            else:
                self._end_older(now - WHOLE_SECONDS)
        if not has_room:
            return self.shutdown_request(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection, and make room for another."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def _end_older(self, than: float) -> None:
        for request, began in self._open.items():
            if began < than:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and makes room

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what nobody foresaw; a client that goes away in the middle is nobody's concern."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class SmallHandler(BaseHTTPRequestHandler):
    """What handlers of a SmallServer have in common."""

    timeout = REQUEST_SECONDS
    server_version, sys_version = "mcore-rl", ""

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not listed: they come every few seconds."""
