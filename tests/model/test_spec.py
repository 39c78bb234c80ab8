"""Flags of Megatron's configuration that the layout decides."""

from __future__ import annotations

import pytest

from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.spec import transformer_config
from mcore_rl.parallel.layout import Layout
from mcore_rl.verify.layouts import problem


@pytest.mark.filterwarnings("ignore:full scope is deprecated")  # Megatron about its own default
@pytest.mark.parametrize("virtual", [None, 2])
def test_interleaved_stages_never_batch_their_messages(virtual: int | None, tmp_path):
    """With Megatron's default p2p flags the interleaved schedule is silently wrong at two stages."""
    arch = read_architecture(problem.write_model(tmp_path / "model", "dense"))
    config = transformer_config(arch, Layout(pipeline=2, virtual_pipeline=virtual), "fp32")
    assert config.overlap_p2p_comm is (virtual is not None)
    assert config.batch_p2p_comm is (virtual is None)
