"""The plan's bytes against those of a real model and a real step in one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mcore_rl.data.balance import model_shape
from mcore_rl.lora import Lora
from mcore_rl.model.hf.architecture import read_architecture, read_hf_config
from mcore_rl.model.portable import PackedLayout
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.pool import Pool
from mcore_rl.plan.count import count_adapters
from mcore_rl.plan.memory import kv_bytes_per_token, stage_memory
from mcore_rl.plan.work import PlannedStep
from tests.plan.measure import measure

LENGTH, COUNT = 256, 8
WITHIN = 0.1
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


LATENT = {name: value for name, value in CONFIG.items() if name != "head_dim"} | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 8,
    "kv_lora_rank": 96,
    "q_lora_rank": 160,
    "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 4,  # experts have activations that depend on the router
}


def work(precision: str, recompute: str, length: float = LENGTH, count: int = COUNT) -> PlannedStep:
    return PlannedStep(
        samples=count,
        prompt_tokens=1.0,
        response_tokens=length - 1,
        longest_response=LENGTH,
        longest=LENGTH,
        mini_batches=1,
        epochs=1,
        tokens_per_micro_batch=LENGTH * count,
        precision=precision,
        recompute=recompute,
        distributed_optimizer=True,
        reference=False,
        critic=None,
        critic_flops=0.0,
        reward_model=None,
        reward_flops=0.0,
        colocated=False,
        generates=False,
        old_log_prob_share=0.0,
    )


def test_the_buckets_of_a_sender_are_counted(directory: Path) -> None:
    arch = read_architecture(directory)
    disk, buckets = (replace(work("bf16", "none"), bucket_bytes=size) for size in (0, 1 << 30))
    largest = 2 * 2 * 1024 * 256  # gate and up in bf16
    assert stage_memory(arch, Layout(), disk)[0].publish == largest
    assert stage_memory(arch, Layout(), buckets)[0].publish == 2 << 30
    tiny = replace(buckets, bucket_bytes=1)
    assert stage_memory(arch, Layout(tensor=2, data=1), tiny)[0].publish == 2.5 * largest


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(CONFIG, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def latent_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(LATENT, tmp_path_factory.mktemp("latent"))


def written(config: dict, path: Path) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_server_keeps_latents_whole_on_each_of_its_gpus(directory: Path, latent_directory: Path) -> None:
    plain, latent = read_architecture(directory), read_architecture(latent_directory)
    assert kv_bytes_per_token(plain) == 2 * 4 * 2 * 4 * 32
    assert kv_bytes_per_token(latent) == 2 * 4 * (96 + 16)
    for arch, path in ((plain, directory), (latent, latent_directory)):
        assert kv_bytes_per_token(model_shape(read_hf_config(path))) == kv_bytes_per_token(arch)
    colocated = replace(work("bf16", "none"), colocated=True)
    whole, cut = (stage_memory(latent, Layout(tensor=n, sequence=n > 1), colocated)[0] for n in (1, 2))
    assert whole.kv_cache == cut.kv_cache > 0
    halved = stage_memory(plain, Layout(tensor=2), colocated)[0]
    assert halved.kv_cache == stage_memory(plain, Layout(), colocated)[0].kv_cache / 2


@pytest.mark.slow
def test_a_step_with_latent_attention_takes_what_the_plan_says(pool1: Pool, latent_directory: Path) -> None:
    (measured,) = pool1.run(measure, latent_directory, "bf16", "none", LENGTH, COUNT)
    (planned,) = stage_memory(read_architecture(latent_directory), Layout(), work("bf16", "none"))
    for component in ("weights", "gradients", "optimizer"):
        assert getattr(planned, component) == measured[component], component
    assert planned.step == pytest.approx(measured["step"], rel=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_of_adapters_takes_what_the_plan_says(pool1: Pool, directory: Path, recompute: str) -> None:
    """Beside the frozen weights there is nothing of their size: no gradients, no moments, no copies."""
    lora, arch = Lora(8, 16.0), read_architecture(directory)
    (measured,) = pool1.run(measure, directory, "bf16", recompute, LENGTH, COUNT, lora)
    (planned,) = stage_memory(arch, Layout(), replace(work("bf16", recompute), lora=lora))
    for component in ("weights", "gradients", "optimizer"):
        assert getattr(planned, component) == measured[component], component
    (trained,) = count_adapters(arch, lora, Layout())
    assert measured["gradients"] == 4 * trained.total
    assert measured["optimizer"] == 12 * trained.total
    assert planned.step == pytest.approx(measured["step"], rel=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_takes_what_the_plan_says(
    pool1: Pool, directory: Path, precision: str, recompute: str
) -> None:
    (measured,) = pool1.run(measure, directory, precision, recompute, LENGTH, COUNT)
    arch = read_architecture(directory)
    (planned,) = stage_memory(arch, Layout(), work(precision, recompute))
    for component in ("weights", "gradients", "optimizer"):
        assert getattr(planned, component) == measured[component], component
    assert planned.step == pytest.approx(measured["step"], rel=WITHIN)
    (shorter,) = stage_memory(arch, Layout(), work(precision, recompute, length=0.7 * LENGTH))
    assert shorter.step != pytest.approx(measured["step"], rel=WITHIN)  # it can fail


def test_the_masks_of_context_parallelism_are_counted_where_they_are_read(directory: Path) -> None:
    """What one micro-batch's mask takes, and none before attention asks for it."""
    arch, layout = read_architecture(directory), Layout.parse("cp2")
    boundaries = torch.arange(COUNT + 1) * LENGTH
    made = PackedLayout.of(torch.zeros(COUNT * LENGTH // 2, dtype=torch.int64), boundaries, LENGTH, context=2)
    assert made.keys is not None
    assert made.masks == {}
    (planned,) = stage_memory(arch, layout, work("fp32", "none"))
    assert planned.masks == made.mask(None, torch.float32).nbytes
    assert made.mask(None, torch.float32) is made.mask(None, torch.float32)
    (by_engine,) = stage_memory(arch, layout, work("bf16", "none"))
    (alone,) = stage_memory(arch, Layout(), work("fp32", "none"))
    assert by_engine.masks == alone.masks == 0
