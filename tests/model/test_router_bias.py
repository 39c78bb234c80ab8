"""DeepSeek's update of the routers' biases: that of the tokens alone at every layout; else they stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.model import step
from mcore_rl.model.build import build_policy
from mcore_rl.model.hf.architecture import architecture_of
from mcore_rl.model.optimizer import build_optimizer, ddp_config
from mcore_rl.model.residency import Swapped
from mcore_rl.model.step import forward_backward
from mcore_rl.model.weights_io import ROUTER_BIAS, global_weights
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.training.setup import check_router_biases
from mcore_rl.tuning import Tuning
from tests.model.conftest import save
from tests.model.families import DEEPSEEK, FAMILIES
from tests.model.support import at_layout
from tests.model.test_families import packed, tokens
from tests.model.test_policy import NegativeLogLikelihood

RATE = 0.01
LAYERS = 4
BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    config = transformers.DeepseekV3Config(**DEEPSEEK | {"num_hidden_layers": LAYERS})
    return save(transformers.AutoModelForCausalLM.from_config, config, tmp_path_factory.mktemp("v3") / "hf")


def moved(mesh: Mesh, directory: Path, rate: float, recompute: Any = "none") -> dict[str, Tensor]:
    """Name -> bias after one optimizer step on tests.model.test_families.tokens."""
    model = build_policy(directory, mesh, ddp=ddp_config(), tuning=Tuning(recompute=recompute))
    optimizer = build_optimizer(model, lr=0.0, router_bias_rate=rate)
    first = Swapped(model)
    optimizer.zero_grad()
    forward_backward(model, packed(mesh), NegativeLogLikelihood(), 1.0)
    optimizer.step()
    found = {n: w.clone() for n, w in global_weights(model.unwrapped).items() if n.endswith(ROUTER_BIAS)}
    with first.resident():
        weights = load_file(directory / "model.safetensors")
        for name, bias in global_weights(model.unwrapped).items():
            if name.endswith(ROUTER_BIAS):
                assert torch.equal(bias, weights[BIAS.format(name.split(".")[2])]), "a swapped reference"
    return found


@pytest.fixture(scope="module")
def expected(directory: Path) -> dict[str, Tensor]:
    """By transformers' routers, on the tokens alone: no packing, no padding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found = {}
    for layer in range(1, LAYERS):
        gate, chosen = model.model.layers[layer].mlp.gate, []
        hook = gate.register_forward_hook(lambda _, __, out, chosen=chosen: chosen.append(out[2].flatten()))
        with torch.no_grad():
            for row in tokens():
                model(torch.tensor([row]))
        hook.remove()
        sent = torch.cat(chosen).bincount(minlength=8).double()
        offset = RATE * torch.sign(sent.mean() - sent)
        found[f"decoder.layers.{layer}.mlp.router.expert_bias"] = gate.e_score_correction_bias + offset
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pool", "layout"), [("pool1", "tp1"), ("pool2", "tp2+sp"), ("pool2", "cp2"), ("pool2", "ep2")]
)
def test_the_update_is_that_of_the_tokens_at_every_layout(
    request, directory: Path, expected: dict[str, Tensor], pool: str, layout: str
) -> None:
    for got in at_layout(request.getfixturevalue(pool), layout, moved, directory, RATE):
        assert got.keys() == expected.keys()
        for name, bias in got.items():
            torch.testing.assert_close(bias.double(), expected[name].double(), rtol=0, atol=1e-6, msg=name)


def test_stages_and_recomputation_count_once(pool2: Pool, directory: Path, expected) -> None:
    answers = at_layout(pool2, "pp2", moved, directory, RATE, "full")
    got = {name: bias for answer in answers for name, bias in answer.items()}
    assert got.keys() == expected.keys()
    for name, bias in got.items():
        torch.testing.assert_close(bias.double(), expected[name].double(), rtol=0, atol=1e-6, msg=name)


def test_padding_that_is_counted_is_seen(pool2: Pool, directory: Path, expected: dict[str, Tensor]) -> None:
    """Negative control: sequences are padded to multiples of 4."""
    answers = at_layout(pool2, "cp2", moved_with_padding, directory)
    assert any(
        not torch.allclose(bias.double(), expected[name].double(), rtol=0, atol=1e-6)
        for name, bias in answers[0].items()
    )


def moved_with_padding(mesh: Mesh, directory: Path) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_of_routers", lambda tokens, mesh: None)
        return moved(mesh, directory, RATE)


def test_without_a_rate_they_stay(pool1: Pool, directory: Path) -> None:
    (got,) = at_layout(pool1, "tp1", moved, directory, 0.0)
    weights = load_file(directory / "model.safetensors")
    for name, bias in got.items():
        assert torch.equal(bias, weights[BIAS.format(name.split(".")[2])])


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3"])
def test_a_model_without_biases_is_refused(family: str) -> None:
    kind, settings = FAMILIES[family]
    arch = architecture_of(getattr(transformers, kind)(**settings).to_dict())
    check_router_biases(arch, 0.0)
    with pytest.raises(ConfigError, match=f"router_bias_rate = 0.01: a {family} model has no router biases"):
        check_router_biases(arch, RATE)
