"""What a rehearsal is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_rl.config import load_config
from mcore_rl.launch.rehearse import write_rehearsal

SGLANG = ["--rollout.server", "sglang", "--rollout.python", "python", "--rollout.options", '["--x"]']
AWAY = ["--rollout.urls", '["http://127.0.0.1:1"]']


@pytest.mark.parametrize(
    "flags",
    [
        [*AWAY, "--publish.transport", "adapter", "--lora.rank", "4", "--lora.path", "an/adapter"],
        [*AWAY, "--publish.transport", "distributed"],
        [*AWAY, "--publish.replica", "copies"],
        [*SGLANG, "--publish.transport", "tensor"],
    ],
    ids=lambda flags: flags[-1],
)
def test_whatever_reaches_the_servers_of_a_run_its_rehearsal_has_the_embedded_one(
    folder: Path, tmp_path: Path, flags: list[str]
) -> None:
    """The file that it writes is valid, which was refused where its transport was that of the run."""
    lines = f"""
        run.dir = "{tmp_path}"
        model.path = "{folder}/policy"
        data.train = "{folder}/train.jsonl"
        reward.function = "mcore_rl.rewards.exact:exact_match"
        train.steps = 5
    """
    (tmp_path / "run.toml").write_text(lines)
    _, tiny = write_rehearsal(load_config(tmp_path / "run.toml", flags), 1)
    assert (tiny.rollout.server, tiny.rollout.urls, tiny.rollout.options) == ("embedded", (), ())
    assert (tiny.publish.transport, tiny.publish.replica, tiny.lora.path) == ("disk", None, None)
