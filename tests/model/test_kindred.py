"""A model under a `model_type` that transformers does not know is the one that it is kin to."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

from mcore_rl.convert.command import hf_to_mcore
from mcore_rl.model.hf.architecture import read_architecture, read_hf_config
from mcore_rl.server.weights import load_model
from tests.model.conftest import save
from tests.model.families import DEEPSEEK, YARN

KIMI = {"q_lora_rank": 10, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
EQUAL_BOUNDS = YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
"""of the blend of yarn, as Kimi-K2 has them"""
PUBLISHED = {
    "model_type": "kimi_k2",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_method": "noaux_tc",
}
"""what its config.json has beside the fields of DeepSeek-V3"""


def test_kimi_k2_is_read_converted_and_served(tmp_path: Path) -> None:
    config = DeepseekV3Config(**DEEPSEEK | KIMI | {"rope_parameters": EQUAL_BOUNDS})
    save(AutoModelForCausalLM.from_config, config, tmp_path / "hf")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    plain = read_architecture(tmp_path / "hf")
    hf = read_hf_config(tmp_path / "hf") | PUBLISHED
    (tmp_path / "hf" / "config.json").write_text(json.dumps(hf))
    assert read_architecture(tmp_path / "hf") == plain
    certificate = hf_to_mcore(tmp_path / "hf", tmp_path / "mcore", certified=True)["certificate"]
    assert certificate["max_abs_logit_difference"] <= 1e-5
    assert read_hf_config(tmp_path / "mcore")["model_type"] == "kimi_k2"
    served, _ = load_model(tmp_path / "hf", "cpu")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(served(tokens).logits, expected(tokens).logits)
