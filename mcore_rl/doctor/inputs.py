"""What the config names: model, tokenizer, prompts, reward."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from mcore_rl.config import Config
from mcore_rl.data.chat import render
from mcore_rl.data.cursor import PromptCursor
from mcore_rl.data.prompts import PromptSet
from mcore_rl.doctor.finding import Finding, guarded
from mcore_rl.doctor.rewards import check_reward, classifier
from mcore_rl.environments.tools import CALL_TOOLS
from mcore_rl.errors import AskedToLeave, ConfigError
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.files import left_out
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.hf.peft_files import adapter_reader, begun_anew
from mcore_rl.model.layouts import check_adapters, check_layout, padded_vocab
from mcore_rl.model.weights_io import hf_reader
from mcore_rl.terminal import listed
from mcore_rl.training.assemble_rollouts import curriculum_of
from mcore_rl.training.data import check_batch, describe_beginning, describe_dropped
from mcore_rl.training.environment import check_environment, doubts_of_tools
from mcore_rl.training.evaluation_sets import key_of, load_set_functions, reading_of
from mcore_rl.training.layout import layout_of, lora_of
from mcore_rl.training.setup import load_tokenizer, read_prompts
from mcore_rl.training.stacked import check_transport
from mcore_rl.training.teachers import check_teachers
from mcore_rl.weight_files import unread

T = TypeVar("T")

_SHOWN = 60
"""characters of a prompt"""
CHOICE_SECONDS = 60.0
_TOO_LATE = signal.SIGUSR2
"""which user code has no use for: SIGALRM is that of deadlines of its own"""


def check_inputs(config: Config, gpus: int) -> list[Finding]:
    """Model, layout, tokenizer, data and reward, in the order in which one rests on another."""
    findings = guarded("model", lambda: _model(config))
    # The rest can be examined without weights, but not without this.
    if guarded("model", lambda: _readable(config)):
        return findings
    findings += guarded("layout", lambda: _layout(config, gpus))
    if config.lora.rank:
        findings += guarded("lora", lambda: _adapters(config))
    findings += guarded("tokenizer", lambda: _tokenizer(config))
    if config.distill.teachers:
        findings += guarded("teachers", lambda: _teachers(config))
    if not any(finding.level == "error" and finding.check == "tokenizer" for finding in findings):
        findings += guarded("data", lambda: _data(config))
    return findings


def _model(config: Config) -> Iterable[Finding]:
    path = config.model.path
    architecture = read_architecture(path)
    what = (
        f"{path}: {architecture.layers} layers, hidden {architecture.hidden}, vocabulary {architecture.vocab}"
    )
    if config.model.random_init:
        yield Finding("model", "ok", f"{what}; weights start at random (model.random_init)")
        return
    hf_reader(path, ParameterMap(architecture, padded_vocab(architecture, 1)))
    if later := left_out(path, architecture):
        yield Finding("model", "warning", later, "keep the source, if a server shall use them")
    yield Finding("model", "ok", f"{what}; names and shapes of its weights are complete")
    if left := unread(path):
        what, _, remedy = left.rpartition("; ")
        yield Finding("model", "warning", what, remedy)


def _readable(config: Config) -> Iterable[Finding]:
    """None; raises what read_architecture does."""
    read_architecture(config.model.path)
    return ()


def _layout(config: Config, gpus: int) -> Iterable[Finding]:
    p = config.parallel
    replica = p.tensor * p.pipeline * p.context
    layout = layout_of(config, replica * (p.data or 1))
    arch = read_architecture(config.model.path)
    check_layout(arch, layout)
    if config.samples_responses:
        check_transport(arch, config)
    yield Finding("layout", "ok", f"legal for this model; one replica takes {replica} ranks")
    if gpus and replica > gpus:
        yield Finding("layout", "note", f"this machine has {gpus} GPUs: start on several nodes with torchrun")


def _adapters(config: Config) -> Iterable[Finding]:
    lora, arch = lora_of(config), read_architecture(config.model.path)
    assert lora is not None
    p = config.parallel
    check_adapters(arch, layout_of(config, p.tensor * p.pipeline * p.context * (p.data or 1)), lora)
    mapping = AdapterMap(arch, lora)
    said = ""
    if lora.path is not None:
        adapter_reader(mapping, lora.path)
        new = begun_anew(mapping, lora.path)
        but = f" but for {listed(new)}, which begin at 0" if new else ""
        said = f"; {lora.path} has them{but}"
    shapes = mapping.hf_shapes().values()
    trained = sum(prod(shape) for shape in shapes)
    what = f"{len(shapes) // 2} adapters of rank {lora.rank}: {trained} numbers are trained"
    yield Finding("lora", "ok", what + said)


def _teachers(config: Config) -> Iterable[Finding]:
    p = config.parallel
    check_teachers(config, layout_of(config, p.tensor * p.pipeline * p.context * (p.data or 1)))
    for name, path in config.distill.teachers.items():
        arch = read_architecture(path)
        hf_reader(path, ParameterMap(arch, padded_vocab(arch, 1)))
        what = f"{name}: {path}: {arch.layers} layers, hidden {arch.hidden}, the student's vocabulary"
        yield Finding("teachers", "ok", f"{what}; names and shapes of its weights are complete")


def _tokenizer(config: Config) -> Iterable[Finding]:
    tokenizer = load_tokenizer(config.model.path)
    vocab = read_architecture(config.model.path).vocab
    beyond = [number for number in config.rollout.stop_token_ids if number >= vocab]
    if beyond:
        what = f"rollout.stop_token_ids: {beyond}, and the vocabulary ends at {vocab - 1}"
        yield Finding(
            "tokenizer", "error", what, "name ids of this model's tokenizer: no response would stop"
        )
        return
    yield Finding("tokenizer", "ok", f"{len(tokenizer)} tokens, end of sequence {tokenizer.eos_token!r}")
    if tokenizer.chat_template:
        yield from _chat_template(tokenizer)


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> Iterable[Finding]:
    """A system and a user turn must both come through, and through the tokens back again."""
    turns = {"system": "1234567", "user": "7654321"}  # digits: every vocabulary has them
    messages = [{"role": role, "content": content} for role, content in turns.items()]
    try:
        text = render("a system and a user turn", messages, tokenizer)
        decoded = str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)))
    except Exception as error:  # tokenizers raises bare exceptions
        yield Finding(
            "chat template",
            "warning",
            f"refuses a system and a user turn ({error})",
            "give prompts without a system turn, or as strings",
        )
        return
    for role, content in turns.items():
        if content not in text or content not in decoded:
            lost = "template drops" if content not in text else "tokenizer loses"
            yield Finding(
                "chat template",
                "warning",
                f"the {lost} the {role} turn",
                "use the template and tokenizer that belong to the model, or give prompts as strings",
            )
            return
    yield Finding("chat template", "ok", "a system and a user turn come through the tokens and back")


def _data(config: Config) -> list[Finding]:
    """Each file by itself: a mistake in one does not hide what is in the other."""
    tokenizer = load_tokenizer(config.model.path)
    read: dict[str, PromptSet] = {}

    def examine(check: str, path: Path | Sequence[Path], **settings: Any) -> Iterable[Finding]:
        read[check] = read_prompts(config, path, tokenizer, whole=True, **settings)
        name = str(path) if isinstance(path, Path) else ", ".join(map(str, path))
        yield from _prompts(check, name, config, read[check])
        if check == "data.train":
            check_batch(config, read[check])

    findings = guarded("data.train", lambda: examine("data.train", config.data.train))
    if (held_out := config.data.validation) is not None:
        findings += guarded("data.validation", lambda: examine("data.validation", held_out))
    for name, one in config.held_out.items():
        settings = reading_of(config, one)
        key = key_of(config, name)
        findings += guarded(key, lambda key=key, one=one, its=settings: examine(key, one.path, **its))
    findings += _overlap(read)
    if config.environment.function is not None and not config.trains_on_rows:
        findings += guarded("environment", lambda: _environment(config, tokenizer))
    if config.eval.sets:
        findings += guarded("eval.sets", lambda: _set_functions(config))
    if not config.trains_on_rows and "data.train" in read:
        findings += guarded("reward", lambda: check_reward(config, read["data.train"]))
        path = config.critic.path
        if path is not None:
            findings += guarded("critic", lambda: [classifier(config, "critic.path", path)])
        if config.data.curriculum is not None:
            findings += guarded("curriculum", lambda: _curriculum(config, read["data.train"]))
    return findings


def _curriculum(config: Config, found: PromptSet) -> Iterable[Finding]:
    """The first step's prompts, drawn as a run draws them."""
    drawn = config.rollout.prompts_per_step
    curriculum = curriculum_of(config)
    assert curriculum is not None
    cursor = PromptCursor(found, config.run.seed, config.data.weights)
    takes = curriculum.takes(1)
    _in_time(f"{curriculum.name} chose no prompts", lambda: cursor.next(drawn, takes))
    yield Finding("curriculum", "ok", f"{curriculum.name} takes {drawn} prompts for the first step")


def _set_functions(config: Config) -> Iterable[Finding]:
    """None; raises for a reward or an answer function that is not there."""
    load_set_functions(config)
    return ()


def _environment(config: Config, tokenizer: PreTrainedTokenizerBase) -> Iterable[Finding]:
    """Whether it can be run, and whether the model can see and make calls where there are tools."""
    check_environment(config)
    e = config.environment
    if e.function != CALL_TOOLS or not e.args["tools"]:
        yield Finding("environment", "ok", f"{e.function} is there")
        return
    for what, remedy in doubts_of_tools(config, tokenizer):
        yield Finding("environment", "warning", what, remedy)
    yield Finding("environment", "ok", f"{e.function} and {len(e.args['tools'])} tools are there")


def _overlap(read: Mapping[str, PromptSet]) -> list[Finding]:
    """A warning for every set that has prompts of the training file."""
    texts = {check: {prompt.text for prompt in found.prompts} for check, found in read.items()}
    trained = texts.pop("data.train", set())
    shared = {check: trained & its for check, its in texts.items()}
    return [
        Finding(
            check,
            "warning",
            f"{len(both)} held-out prompts are training prompts too, such as {min(both)[:_SHOWN]!r}",
            "remove them from one file: accuracy on them is not held out",
        )
        for check, both in shared.items()
        if both
    ]


def _prompts(check: str, name: str, config: Config, found: PromptSet) -> Iterable[Finding]:
    first = found.prompts[0]
    yield Finding(
        check,
        "ok",
        f"{name}: {len(found)} prompts of up to {found.examined.longest} tokens, the first "
        f"{first.text[:_SHOWN]!r}",
    )
    if found.too_long:
        yield Finding(
            check,
            "warning",
            describe_dropped(config, found),
            "raise data.max_prompt_tokens if they matter",
        )
    if found.examined.without_beginning:
        what, _, remedy = describe_beginning(found).partition("; ")
        yield Finding(check, "warning", what, remedy)


def _in_time(late: str, call: Callable[[], T]) -> T:
    """What `call` returns or raises; ConfigError, `late`, when it does neither within CHOICE_SECONDS.

    It runs in the main thread, as in training: there a function may set an alarm of its own.
    """
    main = threading.get_ident()
    timer = threading.Timer(CHOICE_SECONDS, lambda: signal.pthread_kill(main, _TOO_LATE))
    before = signal.signal(_TOO_LATE, _leave)
    timer.start()
    try:
        return call()
    except AskedToLeave as asked:
        if asked.number != _TOO_LATE:
            raise
        raise ConfigError(
            f"{late} within {CHOICE_SECONDS:g} s, and a step waits for each; give what it calls a deadline"
        ) from None
    finally:
        timer.cancel()
        signal.signal(_TOO_LATE, before)


def _leave(number: int, frame: object) -> None:
    raise AskedToLeave(number)
