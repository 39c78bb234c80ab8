"""What doctor says of a model and its layout, for every family; the rest is in test_doctor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mcore_rl.config import load_config
from mcore_rl.doctor.finding import Finding
from mcore_rl.doctor.inputs import check_inputs
from tests.model.families import FAMILIES


def findings(family: str, root: Path, *, lost: str = "") -> list[Finding]:
    """Those of model and layout, of a model without the tensors whose name has `lost` in it."""
    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind)(**settings)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    if lost:
        file = root / "model" / "model.safetensors"
        left = {name: tensor for name, tensor in load_file(file).items() if lost not in name}
        save_file(left, file, metadata={"format": "pt"})
    (root / "problems.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n')
    (root / "config.toml").write_text(
        f'run.dir = "{root}/run"\nmodel.path = "{root}/model"\ndata.train = "{root}/problems.jsonl"\n'
        "train.steps = 3\n[parallel]\ntensor = 2\nsequence = true\n[algorithm]\n"
    )
    said = check_inputs(load_config(root / "config.toml"), 0)
    return [finding for finding in said if finding.check in ("model", "layout")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_is_sound(family: str, tmp_path: Path) -> None:
    assert [(found.check, found.level) for found in findings(family, tmp_path)] == [
        ("model", "ok"),
        ("layout", "ok"),
    ]


@pytest.mark.parametrize(
    ("family", "lost"),
    [("gpt_oss", "1.self_attn.sinks"), ("glm4_moe", "e_score"), ("olmo3", "0.self_attn.k_norm")],
)
def test_a_tensor_of_the_family_that_is_missing_is_named(family: str, lost: str, tmp_path: Path) -> None:
    model, layout = findings(family, tmp_path, lost=lost)
    assert (model.level, layout.level) == ("error", "ok")
    assert lost in model.what
