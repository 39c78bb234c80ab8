"""A value that is not finite: no weight changes, the micro-batch is kept, and its replay finds the value."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mcore_rl.checkpoint import find
from mcore_rl.config import Config, to_toml
from mcore_rl.data.packing import TokenSequence, pack
from mcore_rl.errors import ConfigError, NumericsError
from mcore_rl.launch.replay import _replay, replay_dump
from mcore_rl.model.build import build_policy
from mcore_rl.model.optimizer import ddp_config
from mcore_rl.model.step import forward
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import build_mesh, destroy_mesh
from mcore_rl.training.faults.dump import from_json, to_json
from mcore_rl.training.faults.inspect import FORWARD, Inspector
from mcore_rl.training.loop import learn
from mcore_rl.types import PackedBatch
from mcore_rl.verify.layouts.problem import write_model
from tests.sources import ROOT
from tests.training.test_ppo import built_run, config, recorded, weights

__all__ = ["config"]

TOKEN = 9
"""its embedding is what goes wrong"""


@pytest.fixture(scope="module")
def gspo(config: Config) -> Config:
    """On-policy GSPO with a few small micro-batches."""
    algorithm = config.algorithm.model_copy(update={"name": "gspo", "params": {}, "mini_batches": 1})
    train = config.train.model_copy(update={"tokens_per_micro_batch": 40})
    lengths = {
        "data": config.data.model_copy(update={"max_prompt_tokens": 16}),
        "rollout": config.rollout.model_copy(update={"max_new_tokens": 8}),
    }
    return config.model_copy(update={"algorithm": algorithm, "train": train, **lengths})


def broken_step(config: Config, layout: Layout, directory: Path, ranks: tuple[int, ...]):
    """The error of a step for which these ranks hold a NaN, and whether any other weight moved."""
    with built_run(config, layout, directory) as run:
        (chunk,) = run.trainer.policy.unwrapped
        if run.trainer.mesh.rank in ranks:
            chunk.embedding.word_embeddings.weight.data[TOKEN, 3] = torch.nan
        before = [parameter.detach().clone() for parameter in chunk.parameters()]
        with pytest.raises(NumericsError) as caught:
            learn(run, recorded(run), 2)  # the first only warms up a critic
        pairs = zip(before, chunk.parameters(), strict=True)
        return str(caught.value), all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def unsignalled_step(config: Config, layout: Layout, directory: Path):
    """The metrics of a step whose rewards are all equal, and whether any weight moved."""
    with built_run(config, layout, directory) as run:
        batch = recorded(run)
        batch = replace(batch, samples=tuple(replace(sample, reward=0.5) for sample in batch.samples))
        before = weights(run)
        metrics = learn(run, batch, 2).metrics
        return metrics, all(torch.equal(before[name], now) for name, now in weights(run).items())


def test_a_step_without_any_signal_is_taken_and_moves_nothing(pool2, gspo, tmp_path):
    """The optimizer has no moments yet and no weight decay; the control is a batch with a signal, below."""
    for metrics, still in pool2.run(unsignalled_step, gspo, Layout(data=2), tmp_path, timeout=100.0):
        assert (metrics["reward/no_signal"], metrics["grad_norm"]) == (1, 0)
        assert still


def replayed(config: Config, layout: Layout, dump: Path) -> str:
    """What a replay at `layout` says."""
    mesh = build_mesh(layout, timeout=60.0)
    try:
        saved = find(dump.parent, str(dump))
        _replay(config, mesh, saved, saved.document["numerics"])
    except NumericsError as error:
        return str(error)
    finally:
        destroy_mesh()
    return "finite"


@pytest.fixture(scope="module")
def broken(pool2, gspo, tmp_path_factory):
    """The ranks' answers of a step that all replicas break alike, and the dump."""
    directory = tmp_path_factory.mktemp("broken")
    answers = pool2.run(broken_step, gspo, Layout(data=2), directory, (0, 1), timeout=100.0)
    return answers, directory / "numerics" / "step_2"


def test_no_weight_changes_and_the_micro_batch_is_named_and_kept(broken):
    answers, dump = broken
    assert answers[0] == answers[1], "every rank has the same error"
    message, same = answers[0]
    assert same
    assert "step 2, policy: gradient norm is nan: no weight was changed" in message
    assert f"--replay {dump}" in message
    document = find(dump.parent, str(dump)).document["numerics"]
    batch = from_json(document)
    assert TOKEN in batch.tokens
    assert batch.begins is not None, "its samples share their prompts"
    assert len(document["samples"]) == batch.num_sequences
    assert batch.fields["advantage"].dtype == torch.float32


def test_replayed_experts_are_kept():
    experts = torch.randint(-1, 300, (3, 2, 2), dtype=torch.int16)
    number = torch.zeros(1, dtype=torch.int64)
    rows = {
        "tokens": torch.tensor([1, 2, 3]),
        "position_ids": torch.arange(3),
        "rows": number,
        "targets": number,
    }
    batch = PackedBatch(
        **rows,
        cu_seqlens=torch.tensor([0, 3], dtype=torch.int32),
        max_seqlen=3,
        sequence=number,
        fields={"sample": number},
        experts=experts,
    )
    again = from_json(json.loads(json.dumps(to_json(batch, ["a"]))))
    assert again.experts is not None
    assert again.experts.dtype == torch.int16
    assert torch.equal(again.experts, experts)
    assert from_json(to_json(replace(batch, experts=None), ["a"])).experts is None
    assert again.begins is None
    begins = torch.tensor([2])
    shared = from_json(json.loads(json.dumps(to_json(replace(batch, begins=begins), ["a"]))))
    assert shared.begins is not None
    assert torch.equal(shared.begins, begins)


def test_a_replay_at_another_layout_finds_the_value(pool2, gspo, broken):
    answer = pool2.run(replayed, gspo, Layout(tensor=2), broken[1], timeout=100.0)
    assert answer[0] == answer[1]
    assert "first non-finite value: weight embedding.word_embeddings.weight: nan at [1, 3]" in answer[0]
    with pytest.raises(ConfigError, match="samples share their prompts, and cp2 cannot; replay it at"):
        pool2.run(replayed, gspo, Layout(context=2), broken[1], timeout=100.0)


def test_one_rank_gone_wrong_is_told_from_a_wrong_number(pool2, gspo, tmp_path):
    """Only replica 1 holds the NaN, as after a fault of its device: it is named, the replay is clean."""
    answers = pool2.run(broken_step, gspo, Layout(data=2), tmp_path, (1,), timeout=100.0)
    message, same = answers[0]
    assert message == answers[1][0]
    assert same
    assert answers[1][1]
    assert "of replica 1 on ranks 1, samples" in message
    dump = tmp_path / "numerics" / "step_2"
    assert pool2.run(replayed, gspo, Layout(data=2), dump, timeout=100.0) == ["finite", "finite"]


def replay(config: Config, dump: Path) -> subprocess.CompletedProcess[str]:
    """By the command, on one rank."""
    file = dump.parent / "config.toml"
    file.write_text(to_toml(config))
    command = [sys.executable, "-m", "mcore_rl", "train", str(file), "--replay", str(dump)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_says_where_and_ends_with_70(gspo, broken):
    done = replay(gspo, broken[1])
    assert done.returncode == 70, done.stderr
    assert "replay: output of embedding.word_embeddings (VocabParallelEmbedding): nan" in done.stderr
    assert f"(id {TOKEN}), sample " in done.stderr
    assert done.stderr.count("mcore-rl: NumericsError: ") == 1


def test_what_is_no_dump_is_refused(gspo, tmp_path):
    with pytest.raises(ConfigError, match=r"is no committed checkpoint"):
        replay_dump(gspo, tmp_path / "step_1")


def named_tokens(directory: Path) -> list[str]:
    """What is said of a NaN in the embedding of the prompt of three samples, and of one in a response."""
    mesh = build_mesh(Layout(), timeout=60.0)
    try:
        sequences = [TokenSequence([1, 9, 4], r) for r in ([5, 6], [7], [6, 6, 6])]
        sequences.insert(1, TokenSequence([8], [5]))
        batch = pack(sequences, range(4), {"sample": range(4)}, align=2, share_prompts=True)
        said = []
        for token in (TOKEN, 7):
            model = build_policy(directory, mesh, random_seed=1, ddp=ddp_config(distributed=False))
            (chunk,) = model.unwrapped
            chunk.embedding.word_embeddings.weight.data[token, 3] = torch.nan
            with Inspector(model, batch, list("abcd")) as inspector, torch.no_grad():
                forward(model, [batch], 1.0)
            said += [one.what for one in inspector.findings() if one.phase == FORWARD]
        return said
    finally:
        destroy_mesh()


def test_a_token_of_a_shared_prompt_has_the_names_of_its_samples(pool1, tmp_path):
    directory = write_model(tmp_path / "model", "dense")
    (prompt, response) = pool1.run(named_tokens, directory)[0]
    assert prompt.endswith(f", token 1 (id {TOKEN}), samples a, c, d")
    assert response.endswith(", token 3 (id 7), sample c")
