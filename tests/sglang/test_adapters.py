"""A real server that serves adapters by themselves: what it takes, and what a publish must not trust.

What a publish of adapters by themselves does about it is in test_adapter_publish.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mcore_rl.convert.command import merge
from mcore_rl.lora import Lora
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.peft_files import write_adapter
from tests.rollout.support import http, largest_error, log_probs_of
from tests.sglang.conftest import sglang_server

RANK = 8
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SERVED = ("--enable-lora", "--lora-backend", "torch_native", "--max-lora-rank", str(RANK))
PROMPT, OUTPUT = [3, 4, 5, 6], [7, 11, 13, 17, 19]
CLOSE, APART = 2e-5, 1e-2


@pytest.fixture(scope="module")
def url(dense_dirs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_file = tmp_path_factory.mktemp("lora_server") / "log"
    server = sglang_server(dense_dirs[0], log_file, *SERVED, "--lora-target-modules", *MATRICES)
    with server:
        yield server.url


@pytest.fixture(scope="module")
def adapters(dense_dirs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of random numbers."""
    mapping, made = AdapterMap(read_architecture(dense_dirs[0]), Lora(RANK, 16.0)), []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        shapes = mapping.hf_shapes().items()
        made.append(tmp_path_factory.mktemp("adapter"))
        tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes}
        write_adapter(mapping, tensors, made[-1], base="a model")
    return made


def wanted(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return log_probs_of(model, PROMPT, OUTPUT).detach()


def served(url: str, name: str | None, output: Sequence[int] = OUTPUT) -> list[float]:
    """Log-probs of `output` under the model, with the adapter that was loaded under `name`."""
    asked = {"input_ids": [*PROMPT, *output], "return_logprob": True, "logprob_start_len": len(PROMPT) - 1}
    asked |= {"sampling_params": {"max_new_tokens": 1, "temperature": 1.0}}
    answer = http(url, "/generate", asked | ({} if name is None else {"lora_path": name}))
    assert answer.status == 200, answer.body
    return [entry[0] for entry in answer.body["meta_info"]["input_token_logprobs"][1:]]


def test_adapters_are_served_beside_the_model_and_a_name_outlives_its_adapter(
    url: str, dense_dirs: tuple[Path, Path], adapters: list[Path], tmp_path: Path
) -> None:
    want: dict[str | None, torch.Tensor] = {None: wanted(dense_dirs[0])}
    for number, directory in enumerate(adapters):
        name = f"step_{number}"
        loaded = http(url, "/load_lora_adapter", {"lora_name": name, "lora_path": str(directory)})
        assert loaded.body["success"], loaded.body
        merge(directory, tmp_path / name, model=dense_dirs[0])
        want[name] = wanted(tmp_path / name)
    for name, log_probs in want.items():
        got = served(url, name)
        assert largest_error(got, log_probs) <= CLOSE
        assert all(largest_error(got, other) > APART for n, other in want.items() if n != name), "the control"
    assert not http(url, "/load_lora_adapter", {"lora_name": "step_1", "lora_path": str(adapters[0])}).body[
        "success"
    ], "a name keeps its adapter"
    assert http(url, "/unload_lora_adapter", {"lora_name": "step_0"}).body["success"]
    assert largest_error(served(url, "step_0"), want["step_0"]) <= CLOSE, "the server has loaded it anew"
    assert http(url, "/generate", {"input_ids": PROMPT, "lora_path": "step_9"}).status == 400
