"""A model with stacked experts is published by disk alone, and says so before anything is built."""

from __future__ import annotations

import pytest
import transformers

from mcore_rl.config import load_config
from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.architecture import architecture_of
from mcore_rl.training.stacked import check_transport
from tests.model.families import FAMILIES
from tests.sources import ROOT


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--publish.transport", "tensor"], "publish.transport = 'tensor'"),
        (["--publish.transport", "distributed"], "publish.transport = 'distributed'"),
        (["--publish.replica", "here"], "publish.replica"),
        (["--publish.quantize", "fp8"], "publish.quantize = 'fp8'"),
        ([], ""),
    ],
)
def test_other_ways_to_the_servers_are_refused(options: list[str], named: str) -> None:
    config = load_config(ROOT / "examples" / "gspo_8b.toml", options)
    kind, settings = FAMILIES["gpt_oss"]
    arch = architecture_of(getattr(transformers, kind)(**settings).to_dict())
    plain = architecture_of(transformers.MistralConfig(**FAMILIES["mistral"][1]).to_dict())
    check_transport(plain, config)
    if not named:
        return check_transport(arch, config)
    with pytest.raises(ConfigError, match=f"{named} is not supported with 'gpt_oss'"):
        check_transport(arch, config)
