"""What all tests share: process pools, and annotations checked at run time in the pools' processes too."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mcore_rl.parallel.pool import Pool
from tests.annotations import check_annotations

pytest_plugins = ("tests.embedded", "tests.launched")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # what is forked must have no threads; as the Makefile says

settings.register_profile("untimed", deadline=None)  # a busy machine is not a failing example
settings.load_profile("untimed")

GROUPS = {"pool1": "ranks", "pool2": "ranks", "pool4": "ranks"}
"""session fixture -> xdist group: one worker owns the pools, so that they start once and do not compete"""


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, built here: no download."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+-=ab "])}
    inner = Tokenizer(models.WordLevel(vocabulary))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


multiprocessing.set_forkserver_preload(["tests.preloaded"])


def forked(world: int) -> Pool:
    """A pool whose processes are forked from one that has imported the library, its annotations checked."""
    return Pool(world, setup=check_annotations)


@pytest.fixture(scope="session")
def pool1() -> Iterator[Pool]:
    """One process in a gloo group of its own, kept for the session."""
    with forked(1) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool2() -> Iterator[Pool]:
    """Two processes in one gloo group, kept for the session."""
    with forked(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool4() -> Iterator[Pool]:
    """Four processes in one gloo group, kept for the session."""
    with forked(4) as pool:
        yield pool


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system of its own; needs root and CAP_SYS_ADMIN."""
    place = tmp_path / "disk"
    place.mkdir()

    def tmpfs(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a tmpfs")
        return place

    yield tmpfs
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for group in sorted({GROUPS[name] for name in getattr(item, "fixturenames", ()) if name in GROUPS}):
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Every worker imports all tests: no collection walks what stays, and the rewritten tests are kept.

    Either took some ten CPU-seconds of a worker, the second where the environment says to keep no byte code.
    """
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, False
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        sys.dont_write_bytecode = kept
