"""The run directory's disk, and the machine's ports."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from mcore_rl.doctor.finding import Finding

PUBLISHED_VERSIONS = 3
"""versions of the weights on disk at once: the initial, the serving one and the one being written"""
SLOW_FSYNC = 1.0
"""seconds for a megabyte; a local disk takes a few milliseconds, a healthy network disk a tenth"""
_GIB = 2**30


def check_disk(check: str, directory: Path, needed: int) -> Iterable[Finding]:
    """That `directory` can be made and written, has `needed` bytes, and that fsync returns soon."""
    existing = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    if not existing.is_dir():
        yield Finding(
            check, "error", f"{existing} is a file", "name a directory whose parents are directories"
        )
        return
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            began = time.monotonic()
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
            seconds = time.monotonic() - began
    except OSError as error:
        yield Finding(
            check,
            "error",
            f"cannot write to {existing}: {error.strerror}",
            "change its rights or choose another",
        )
        return
    if seconds > SLOW_FSYNC:
        yield Finding(
            check,
            "warning",
            f"{existing}: writing and syncing 1 MiB took {seconds:.1f} s",
            "use a faster disk, or saves and publishes will stall the run",
        )
    free = shutil.disk_usage(existing).free
    if free < needed:
        yield Finding(
            check,
            "error",
            f"{existing} has {free / _GIB:.1f} GiB free, {needed / _GIB:.1f} GiB are needed",
            "free space, or choose a larger disk",
        )
    else:
        room = f"{free / _GIB:.1f} GiB free, {needed / _GIB:.1f} GiB needed"
        yield Finding(check, "ok", f"{existing}: {room}, fsync {seconds * 1e3:.0f} ms")


def check_ports() -> Iterable[Finding]:
    """That this machine can listen on its own address: torchrun and launched servers need it."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            socket.create_connection(listener.getsockname(), timeout=5.0).close()
    except OSError as error:
        yield Finding(
            "ports",
            "error",
            f"cannot listen on 127.0.0.1: {error}",
            "allow local connections (sandbox or firewall), or free file descriptors",
        )
        return
    yield Finding("ports", "ok", "the system gives free ports on 127.0.0.1")


def weight_bytes(model: Path) -> int:
    """Bytes of an HF directory's safetensors files."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))
