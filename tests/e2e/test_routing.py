"""A whole run with rollout.routing_replay: generation beside training, saved with samples in flight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcore_rl.checkpoint import find
from mcore_rl.log import read_metrics
from mcore_rl.rollout.saved import reply_from_json
from tests.e2e.conftest import Task
from tests.e2e.ranks import Ranks
from tests.e2e.test_async import gspo, task  # noqa: F401 a fixture

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
}


def test_a_run_replays_and_saves_what_is_in_flight(ranks: Ranks, task: Task, tmp_path: Path) -> None:  # noqa: F811
    model = tmp_path / "model"
    model.mkdir()
    for file in (task.root / "data" / "model").iterdir():
        if file.suffix != ".safetensors":  # of a model without experts
            (model / file.name).write_bytes(file.read_bytes())
    hf = json.loads((model / "config.json").read_text()) | EXPERTS
    (model / "config.json").write_text(json.dumps(hf))
    directory = tmp_path / "run"
    flags = ["--model.path", str(model), "--rollout.threads", "1", "--rollout.routing_replay", "true"]
    flags += ["--train.steps", "2", "--checkpoint.every", "1"]
    done = ranks.run(*gspo(task, directory), *flags)
    assert done.returncode == 0, done.stderr
    trained = read_metrics(directory / "metrics.jsonl")[1:]
    assert [line["step"] for line in trained] == [1, 2]
    assert all(line["mismatch/max_abs"] <= 2e-4 for line in trained if "mismatch/max_abs" in line)
    assert "mismatch/max_abs" in trained[0]
    saved = find(directory / "checkpoints", "previous").document["state"]["ahead"]["groups"]
    replies = [reply for group in saved for reply in group["replies"] or ()]
    assert replies, "nothing had finished"
    chosen: set[int] = set()
    for reply in replies:
        experts = reply_from_json(reply, routed=True).experts
        assert experts is not None
        assert len(experts) > len(reply["token_ids"])
        assert not experts[:, 0].any()
        chosen |= {*experts[:, 1:].flatten().tolist()}
    assert chosen == set(range(8)), "routers choose among all"
