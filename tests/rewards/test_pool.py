"""The processes of a reward function: what user code does there costs its sample, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mcore_rl.errors import ConfigError, ResourceError, RewardError
from mcore_rl.rewards import RewardFunction, RewardPool, Task, check_rate, workers
from mcore_rl.rewards.pool import Reasons
from mcore_rl.rewards.process import RewardProcess
from mcore_rl.types import Group, Prompt, RewardPart, Sample, TurnReward, VersionSpan
from tests.sources import ROOT

FUNCTIONS = "tests.rewards.functions"
SECONDS = 3.0


def groups(*texts: str) -> list[Group]:
    prompt = Prompt("p", "40+2=", (1,), "42", {"key": 3.0})
    spans = (VersionSpan("0", 0, 1),)
    made = [
        Sample.of_response(f"p@0/{k}", prompt, (2,), (-0.5,), t, "stop", spans) for k, t in enumerate(texts)
    ]
    return [Group("p@0", tuple(made)), Group("none@0", ())]


def pool_of(
    function: str, *, workers: int = 2, model: Path | None = None, seconds: float = SECONDS
) -> RewardPool:
    functions = (RewardFunction(f"{FUNCTIONS}:{function}"),)
    return RewardPool(Task(functions, {"a": 2.0}, 8.0, model, timeout=seconds), workers=workers)


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with pool_of("does") as made:
        yield made


@pytest.mark.parametrize(
    ("text", "reason", "said"),
    [
        ("raises", "raised", r"raised ValueError: no \\x1b"),
        ("exits", "raised", "raised SystemExit: 0"),
        ("exits 3", "raised", "raised SystemExit: 3"),
        ("interrupted", "raised", "raised KeyboardInterrupt"),
        ("generator", "raised", "raised GeneratorExit"),
        ("_exits", "exited", r"ended its process \(status 0\)"),
        ("crashes", "exited", r"ended its process \(SIGSEGV\)"),
        ("signal", "exited", r"ended its process \(signal 39\)"),
        ("hangs", "timeout", "gave no reward within 3 s"),
        ("prints", "output", "printed more than 1 MiB"),
        ("grows", "memory", "raised MemoryError"),
        ("nan", "returned", "returned NaN; return a finite number"),
        ("text", "returned", "returned str; return a float"),
        ("none", "returned", "returned NoneType"),
        ("odd", "returned", "returned Odd"),
        ("ending", "returned", r"returned what cannot be read \(SystemExit: 3\)"),
        ("copy", "forked", "forked, and the new process came back"),
        ("copy raises", "forked", "forked, and the new process came back"),
        ("void", "grader", "returned Void"),
        ("kills its group", "exited", r"ended its process \(SIGKILL\)"),
        ("closes all", "exited", "ended its process"),
        ("stops", "timeout", "gave no reward within"),
        ("says noise", "exited", "wrote into its connection to the trainer"),
        ("says half", "timeout", "gave no reward within"),
        ("says too much", "exited", "wrote into its connection to the trainer"),
        ("says an object", "exited", "wrote into its connection to the trainer"),
        ("says NaN", "exited", "wrote into its connection to the trainer"),
        ("says a tower", "exited", "wrote into its connection to the trainer"),
        ("says a number", "exited", "wrote into its connection to the trainer"),
    ],
)
def test_its_sample_is_void_and_the_others_have_rewards(pool, capfd, text, reason, said):
    (scored, none), reasons = pool.score(groups("a", text, "b", "c"))
    assert [(s.reward, s.void) for s in scored.samples] == [
        (1.0, False),
        (None, True),
        (1.0, False),
        (1.0, False),
    ]
    assert none.samples == ()
    assert reasons.counts == {reason: 1}
    with pytest.raises(RewardError, match=rf"f gave 1 of 4 samples .*{reason}: 1.*p@0/1 {said}") as caught:
        check_rate(4, [Reasons(), reasons], 0.05, "f")
    assert caught.value.exit_code == 2
    assert len(capfd.readouterr().err) < 50_000
    check_rate(4, [reasons], 0.25, "f")


@pytest.mark.parametrize(
    ("text", "reward"), [("pool", 3.0), ("alarm", 0.25), ("closes", 1.0), ("torch", 0.0)]
)
def test_what_a_process_may_do_it_may_do_here(pool, text, reward):
    (scored, _), reasons = pool.score(groups(text, "a"))
    assert [s.reward for s in scored.samples] == [reward, 1.0]
    assert not reasons.counts


def test_parts_and_turns_arrive(pool):
    (scored, _), _ = pool.score(groups("parts"))
    (one,) = scored.samples
    assert (one.reward, one.turn_rewards) == (2.5, (TurnReward(0, 2.5),))
    assert one.parts == (RewardPart("a", 1.0, 2.0), RewardPart("b", 0.5, 1.0))


def test_no_sample_sees_what_another_did_to_its_prompt(pool):
    (scored, _), reasons = pool.score(groups("pops", "pops", "pops"))
    assert [s.reward for s in scored.samples] == [3.0] * 3, reasons


def test_all_samples_void_end_the_run_at_any_rate():
    every = Reasons()
    every.add("raised", "p@0/0", "raised ValueError")
    with pytest.raises(RewardError, match="1 of 1"):
        check_rate(1, [every], 1.0, "f")
    check_rate(2, [every], 1.0, "f")
    check_rate(2, [], 0.0, "f")


@pytest.mark.parametrize(
    ("function", "texts", "rewards", "counts"),
    [
        ("asynchronous", ("a", "b"), [2.0, 2.0], {}),
        ("compared", ("b", "a", "void"), [1.0, 0.0, None], {"grader": 1}),
        ("too_few", ("b", "a"), [None, None], {"returned": 2}),
    ],
)
def test_functions_of_groups_and_coroutines(function, texts, rewards, counts):
    with pool_of(function, workers=1) as pool:
        (scored, _), reasons = pool.score(groups(*texts))
    assert [s.reward for s in scored.samples] == rewards
    assert reasons.counts == counts


def test_a_function_that_is_not_there_is_said_by_name():
    with pool_of("no_such") as pool, pytest.raises(ConfigError, match="has no no_such"):
        pool.score(groups("a"))


def alive(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ends(number: int) -> bool:
    deadline = time.monotonic() + 20.0
    while alive(number) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(number)


def test_many_calls_leave_no_process_file_or_memory(pool):
    """Two hundred rounds; what a call leaves behind ends with the pool."""
    pool.score(groups("a"))
    me = psutil.Process()
    before = (len(me.children(recursive=True)), me.num_fds(), me.memory_info().rss)
    for _ in range(200):
        pool.score(groups("a", "_exits" if _ % 40 == 0 else "b"))
    after = (len(me.children(recursive=True)), me.num_fds(), me.memory_info().rss)
    assert after[0] <= max(before[0], 2)
    assert after[1] <= before[1] + 4  # a second worker's pipe and socket
    assert after[2] - before[2] < 5 << 20


def test_what_the_function_left_running_ends_with_the_pool():
    with pool_of("does", workers=1) as pool:
        (scored, _), _ = pool.score(groups("daemon", "process"))
        child, worker = (int(s.reward or 0) for s in scored.samples)
        assert alive(child)
        assert alive(worker)
    assert ends(child)
    assert ends(worker)


TRAINER = """
import sys
from tests.rewards.test_pool import groups, pool_of
pool = pool_of("does", workers=1)
(scored, _), _ = pool.score(groups("process"))
print(int(scored.samples[0].reward), flush=True)
sys.stdin.read()
"""


def test_a_worker_that_is_killed_while_it_starts_costs_no_sample(monkeypatch):
    """The first one ends the run, worth a retry: nobody has imported the function yet."""
    monkeypatch.setattr(workers, "PATIENCE", 0.0)  # a second one is started at once
    begin = RewardProcess.__init__
    started, doomed = [], {2}

    def killed(worker: RewardProcess, task: Task) -> None:
        begin(worker, task)
        started.append(worker)
        if len(started) in doomed:
            worker.process.kill()

    monkeypatch.setattr(RewardProcess, "__init__", killed)
    with pool_of("does") as one:
        scored, reasons = one.score(groups(*["slow"] * 20))
        assert len(started) > 1
        assert not reasons.counts
        assert all(sample.reward is not None for sample in scored[0].samples)
    doomed.add(len(started) + 1)
    with pool_of("does") as one, pytest.raises(ResourceError, match="was killed") as lost:
        one.score(groups("42"))
    assert lost.value.exit_code == 75


def test_a_worker_ends_with_a_trainer_that_is_killed():
    command = [sys.executable, "-c", TRAINER]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None
        worker = int(trainer.stdout.readline())
        assert alive(worker)
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    assert ends(worker)


@pytest.mark.slow
def test_tags_that_are_special_tokens_are_in_the_full_text(tmp_path):
    tokens = {"a": 0, "<|im_end|>": 1, "": 2}
    model = Tokenizer(WordLevel(tokens, unk_token=""))
    model.add_special_tokens(["<|im_end|>"])
    model.save(str(tmp_path / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).save_pretrained(tmp_path)
    (group, _) = groups("a")
    (one,) = group.samples
    (segment,) = one.segments
    tagged = replace(one, segments=(replace(segment, token_ids=(0, 1), log_probs=(-1.0, -1.0)),))
    with pool_of("with_special_tokens", workers=1, model=tmp_path, seconds=60.0) as pool:
        ((scored,), reasons) = pool.score([replace(group, samples=(tagged,))])
    assert scored.samples[0].reward == 1.0, reasons
