#!/usr/bin/env python3
"""Runs the steps of a Dockerfile in a directory, without a container engine.

    python tools/run_dockerfile.py docker/Dockerfile.cpu DIRECTORY [--context .] [--arg NAME=VALUE ...]

FROM is not fetched: this machine's programs take its place, so that what the steps themselves do is shown,
and not what the image brings. ARG, ENV, WORKDIR, COPY, RUN and CMD are interpreted; a path that lies below a
WORKDIR of the file lies below DIRECTORY here, and any other absolute path in a RUN is refused.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_OUTSIDE = re.compile(r"(?<![\w.$}/:-])/(?!dev/null|$)\w[\w./-]*")
"""an absolute path in a command"""


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(name, rest) of each instruction, continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name.upper(), rest.strip()


class Build:
    """A build whose file system is a directory."""

    def __init__(self, root: Path, context: Path, arguments: Mapping[str, str]) -> None:
        """`arguments`: values of ARG, in the place of those in the file."""
        self._root, self._context, self._arguments = root.resolve(), context.resolve(), arguments
        self.environment = dict(os.environ)
        self._at, self._workdirs = "/", list[str]()

    def here(self, path: str) -> Path:
        """Where an absolute path of the image is."""
        return self._root / path.lstrip("/")

    def run(self, steps: Sequence[tuple[str, str]]) -> None:
        """Run each. Raises ValueError for one that is unknown, CalledProcessError where one fails."""
        self._workdirs = [rest for name, rest in steps if name == "WORKDIR"]
        for name, rest in steps:
            print(f"{name} {rest}", file=sys.stderr, flush=True)
            work = getattr(self, f"_{name.lower()}", None)
            if work is None:
                raise ValueError(f"{name}: not an instruction that is interpreted here")
            work(rest)

    def _from(self, rest: str) -> None:
        pass

    def _cmd(self, rest: str) -> None:
        pass

    def _arg(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        self.environment[name] = self._arguments.get(name, value.strip('"'))

    def _env(self, rest: str) -> None:
        for name, value in re.findall(r'(\w+)=("[^"]*"|\S+)', rest):
            known = _VARIABLE.sub(lambda m: self.environment.get(m[1] or m[2], ""), value.strip('"'))
            self.environment[name] = ":".join(map(self._mapped, known.split(":")))

    def _mapped(self, path: str) -> str:
        below = any(path == one or path.startswith(f"{one}/") for one in self._workdirs)
        return str(self.here(path)) if below else path

    def _workdir(self, rest: str) -> None:
        self._at = rest
        self.here(rest).mkdir(parents=True, exist_ok=True)

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        place = self.here(os.path.join(self._at, target))
        for name in sources:
            source = self._context / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, place, dirs_exist_ok=True, ignore=ignored)
            else:
                shutil.copy(source, place / source.name if len(sources) > 1 or place.is_dir() else place)

    def _run(self, rest: str) -> None:
        if outside := _OUTSIDE.findall(rest):
            raise ValueError(f"RUN names {outside[0]}, which is this machine's; use a path below the WORKDIR")
        words = ["bash", "-euo", "pipefail", "-c", rest]
        subprocess.run(words, cwd=self.here(self._at), env=self.environment, check=True)


def main() -> int:
    """Returns 0 when every step did."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--context", type=Path, default=Path("."))
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE")
    a = parser.parse_args()
    if wrong := [one for one in a.arg if "=" not in one]:
        parser.error(f"--arg {wrong[0]}: give it a value, --arg {wrong[0]}=VALUE")
    arguments = dict(one.split("=", 1) for one in a.arg)
    try:
        Build(a.directory, a.context, arguments).run([*instructions(a.dockerfile.read_text())])
    except (ValueError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
