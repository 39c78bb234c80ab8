"""A rehearsal: the same config, family and kinds of parallelism, tiny, on the CPUs of this machine."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import BaseModel
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mcore_rl.config import Config, load_config, to_toml, warnings
from mcore_rl.config.parallel import ParallelConfig
from mcore_rl.config.sections import EvalSetConfig
from mcore_rl.directories import locked, make
from mcore_rl.environments import rehearsed
from mcore_rl.errors import EXIT_DONE, LayoutError
from mcore_rl.launch.shrink import shrink_model
from mcore_rl.launch.start import Source, launch_node, run_rank, under_torchrun
from mcore_rl.model.hf.architecture import read_architecture, read_hf_config
from mcore_rl.model.hf.parameters import CriticParameterMap, ParameterMap
from mcore_rl.model.hf.stacked import joined
from mcore_rl.model.policy import with_value_head
from mcore_rl.model.weights_io import hf_reader, random_reader
from mcore_rl.terminal import printable
from mcore_rl.training.layout import layout_of
from mcore_rl.training.setup import world_size

STEPS = 3
PROCESSES = 8
LOCK = ".mcore_rl.rehearsal.lock"
_REMEDY = "set run.dir to another directory"
_WAIT_SECONDS = 60.0
_VOCABULARY = ("<|endoftext|>", "<eos>", *"0123456789+=")
"""pads with the token that transformers adds to every tokenizer of a Qwen2 model that lacks it"""


def rehearse(config: Config, processes: int | None = None) -> int:
    """Train STEPS steps of the shrunk config, go back one and train it again, read the export; the exit code.

    Outside torchrun it starts `processes` ranks on this node; under torchrun it is one of those there
    are, which train without going back.

    Raises:
        LayoutError: not even degrees of 2 fit into so many processes.
        StorageError: another process rehearses in this run directory.
    """
    if under_torchrun():
        return _rehearse_as_rank(config)
    with _rehearsing(config):
        return _rehearse_on_node(config, processes or PROCESSES)


def _rehearsing(config: Config) -> AbstractContextManager[None]:
    """Hold RUN_DIR/rehearsal, by a lock beside it: it is removed when a rehearsal begins."""
    return locked(config.run.dir, _REMEDY, name=LOCK)


def _rehearse_on_node(config: Config, processes: int) -> int:
    file, tiny = write_rehearsal(config, processes)
    for resume in ((), ("--resume", "previous")):
        code = launch_node(tiny, Source(resume[1] if resume else None), ["train", str(file), *resume])
        if code != EXIT_DONE:
            return code
        _say("resumed and trained the last step again" if resume else f"{STEPS} steps trained and saved")
    _say(_exported(tiny))
    return EXIT_DONE


def _say(what: str) -> None:
    print(printable(f"rehearsal: {what}"), file=sys.stderr, flush=True)


def _rehearse_as_rank(config: Config) -> int:
    """The first rank writes the files, the others wait for them."""
    file = config.run.dir / "rehearsal" / "rehearsal.toml"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_WAIT_SECONDS))  # pyright: ignore[reportPrivateImportUsage]
    with ExitStack() as stack:
        if int(os.environ["RANK"]) == 0:
            try:
                stack.enter_context(_rehearsing(config))
                write_rehearsal(config, world_size())
            finally:
                store.set("rehearsal", "written")  # with an error, the others find no file and end too
        store.wait(["rehearsal"])
        return run_rank(load_config(file), Source())


def _exported(tiny: Config) -> str:
    """What was exported read back: every tensor there, with the shape that config.json asks for.

    Raises:
        ConfigError: they are not.
    """
    directory = tiny.run.dir / "model"
    if tiny.run.kind == "rl":
        (directory,) = (path for path in (tiny.run.dir / "weights").iterdir() if path.is_dir())
    arch = read_architecture(directory)
    table = CriticParameterMap if tiny.run.kind == "reward_model" else ParameterMap
    hf_reader(directory, table(arch, arch.vocab))
    return f"exported and read back: {directory}"


def write_rehearsal(config: Config, processes: int) -> tuple[Path, Config]:
    """Write RUN_DIR/rehearsal with a tiny model, problems and a config; its file, and it as it is read back.

    Says on stderr what shrank.

    Raises:
        LayoutError: not even degrees of 2 fit into so many processes.
        ConfigError: RUN_DIR/rehearsal holds what something else wrote.
    """
    directory = config.run.dir / "rehearsal"
    make(directory, _REMEDY, kind="rehearsal")
    parallel = shrink_parallel(config.parallel, processes)
    _write_model(directory / "model", config.model.path, parallel)
    for name, source in (("reward_model", config.reward.model), ("critic", config.critic.path)):
        if source is not None:
            _write_scored_by(directory / name, source, parallel, config.run.seed, CriticParameterMap)
    for number, (name, path) in enumerate(config.distill.teachers.items(), 1):
        seed = config.run.seed + number  # its own: a student is no distance from itself
        _write_scored_by(directory / f"teacher_{name}", path, parallel, seed, ParameterMap)
    lines = "".join(json.dumps(problem) + "\n" for problem in _problems(config))
    (directory / "problems.jsonl").write_text(lines)
    file = directory / "rehearsal.toml"
    file.write_text(to_toml(_shrink_config(config, parallel, directory)))
    tiny = load_config(file)
    for line in _differences(config, tiny):
        _say(line)
    said_by_ranks = warnings(tiny)
    for what in warnings(config):
        if what not in said_by_ranks:
            _say(f"warning: {what}")
    return file, tiny


def _problems(config: Config) -> Iterator[dict[str, Any]]:
    """Sums of two digits, in the form that the kind of training reads."""
    judged = config.run.kind == "preference" and config.preference.loss == "kto"
    teachers = list(config.distill.teachers) or [""]
    for a in range(1, 10):
        for b in range(1, 10):
            right, wrong = str(a + b), str(a + b + 1)
            if judged:
                answer = right if a < b else wrong
                yield {"prompt": f"{a}+{b}=", "completion": answer, "label": a < b}
            else:
                one = {"prompt": f"{a}+{b}=", "label": right, "chosen": right, "rejected": wrong}
                yield {**one, "teacher": teachers[(a + b) % len(teachers)]}


def shrink_parallel(parallel: ParallelConfig, processes: int) -> ParallelConfig:
    """Every degree above 1 becomes 2; data parallelism takes the processes that are left."""
    degrees = {"tensor", "pipeline", "context", "expert"}
    small: dict[str, Any] = {name: min(2, getattr(parallel, name)) for name in degrees}
    small["virtual_pipeline"] = 2 if parallel.virtual_pipeline else None
    replica = small["tensor"] * small["pipeline"] * small["context"]
    least = replica * (2 if (parallel.data or 1) > 1 else 1)
    if small["expert"] == 2 and small["tensor"] * small["context"] == 1:
        least = replica * 2  # experts are spread over replicas here
    if least > processes:
        raise LayoutError(
            f"--rehearse-procs {processes}: with every degree of [parallel] above 1 kept at 2, a rehearsal "
            f"takes {least} processes; ask for {least} or more"
        )
    small["data"] = 1 if parallel.data == 1 else processes // replica
    return parallel.model_copy(update=small)


def _write_model(directory: Path, source: Path, parallel: ParallelConfig) -> None:
    """config.json of a tiny `source`, and a tokenizer of single characters; the weights are random."""
    hf = shrink_model(read_hf_config(source), parallel, len(_VOCABULARY), str(source / "config.json"))
    vocabulary = {token: index for index, token in enumerate(_VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    make(directory, _REMEDY, kind="model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_VOCABULARY[0], eos_token=_VOCABULARY[1]
    ).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(hf, indent=2))


def _write_scored_by(
    directory: Path, source: Path, parallel: ParallelConfig, seed: int, table: type[ParameterMap]
) -> None:
    """A tiny frozen model of the family of `source`, over the rehearsal's tokens; random weights.

    Args:
        table: CriticParameterMap for a sequence classifier, ParameterMap for a teacher.
    """
    _write_model(directory, source, parallel)
    arch = read_architecture(directory)
    mapping = table(arch, arch.vocab)
    read = with_value_head(random_reader(mapping, seed), arch, seed)
    weights = joined({name: read(name) for name in mapping.hf_shapes()})
    save_file(weights, directory / "model.safetensors")


def _shrink_config(config: Config, parallel: ParallelConfig, directory: Path) -> Config:
    """Not validated: `load_config` reads the file that is written of it."""
    rollout, train, algorithm = config.rollout, config.train, config.algorithm
    changes: dict[str, dict[str, Any]] = {
        "run": {"dir": directory / "run"},  # a directory is of one kind
        "model": {
            "path": directory / "model",
            "precision": "fp32",  # and what to_toml leaves out then: the fp8 keys
            "random_init": True,
        },
        "data": _tiny_data(config, directory / "problems.jsonl"),
        "eval": {
            "sets": {
                name: _shrink_set(one, directory / "problems.jsonl", by_model=config.reward.model is not None)
                for name, one in config.eval.sets.items()
            },
        },
        "rollout": {
            "urls": (),
            "server": "embedded",
            "python": None,
            "options": (),
            "prompts_per_step": 8,
            "samples_per_prompt": min(4, rollout.samples_per_prompt),
            "max_new_tokens": 6,
            "dynamic_sampling": 0,  # random weights are never right
            "stop_token_ids": (),
            "api_key_env": None,
            "threads": 1,
            "dump": min(1, rollout.dump),
        },
        "environment": _tiny_environment(config),
        "reward": {
            "function": "mcore_rl.rewards.exact:exact_match",
            "functions": {},
            "weights": {},
            "model": config.reward.model and directory / "reward_model",
        },
        "algorithm": {
            "mini_batches": min(2, algorithm.mini_batches),
            "params": {key: value for key, value in algorithm.params.items() if key != "kl_horizon"},
        },
        "lora": {"path": None},  # its shapes are those of the model that is stood for
        "optimizer": {"warmup_steps": 0, "cpu_fraction": 0.0},  # it takes a GPU, and saves nothing
        "critic": {
            "path": config.critic.path and directory / "critic",
            "warmup_rollouts": min(1, config.critic.warmup_rollouts),
        },
        "train": {
            "steps": STEPS,
            "tokens_per_micro_batch": min(128, train.tokens_per_micro_batch),
            "eval_every": 0,
            "eval_samples": 16,
        },
        "checkpoint": {"dir": None, "every": 1, "keep": 2},
        "supervised": {"batch_size": 16, "target": "label"},
        "distill": {
            "teachers": {name: directory / f"teacher_{name}" for name in config.distill.teachers},
            "teacher_key": config.distill.teacher_key and "teacher",
        },
        "residency": {"servers": "resident"},  # the embedded server keeps its memory
        "publish": {
            "transport": "disk",  # the only one of the embedded server
            "dir": None,
            "replica": None,
            "quantize": "none",
            "tolerance_p999": 1e-4,
            "tolerance_max": 2e-4,
        },
    }
    sections: dict[str, BaseModel] = {
        name: getattr(config, name).model_copy(update=values) for name, values in changes.items()
    }
    return config.model_copy(update=sections | {"parallel": parallel})


def _tiny_data(config: Config, problems: Path) -> dict[str, Any]:
    """[data] of a rehearsal, whose rows have every key that a kind may read."""
    return {
        "train": (problems,),
        "weights": (),
        "eval": config.data.eval and problems,
        "validation": config.data.validation and problems,
        "chosen_key": "chosen",
        "rejected_key": "rejected",
        "completion_key": "completion",
        "margin_key": "",
        "prompt_key": "prompt",
        "label_key": "label",
        "id_key": "id",
        "apply_chat_template": False,
        "system": None,
        "tools": None,
        "chat_template_kwargs": {},
        "last_assistant": "refuse",
        "max_prompt_tokens": 8,
        "curriculum": None,
    }


def _tiny_environment(config: Config) -> dict[str, Any]:
    """[environment] of a rehearsal: a user's own wants other prompts, tools and programs."""
    if config.environment.function is None:
        return {}
    return {
        "function": f"{rehearsed.__name__}:{rehearsed.ask_again.__name__}",
        "args": {},
        "max_turns": rehearsed.TURNS,
        "max_tokens": rehearsed.TOKENS,
        "response_template": None,
        "tool_call_parser": None,
        "reasoning_parser": None,
    }


def _shrink_set(one: EvalSetConfig, problems: Path, *, by_model: bool) -> EvalSetConfig:
    """A set of the tiny problems, scored as they are: a user's own reward and answers fit other texts."""
    samples = min(4, one.samples)
    pass_at = tuple(k for k in one.pass_at if k <= samples)
    majority_at = () if by_model else tuple(k for k in one.majority_at if k <= samples)
    changes = {"path": problems, "prompts": 16, "samples": samples, "max_new_tokens": None, "reward": None}
    changes |= {"answer": None, "pass_at": pass_at, "majority_at": majority_at}
    changes["pass_reward"] = (one.pass_reward or 0.0) if by_model and pass_at else None
    return one.model_copy(update=changes)


def _differences(config: Config, tiny: Config) -> Iterator[str]:
    """Sizes and settings before and after."""
    p = config.parallel
    before = layout_of(config, p.tensor * p.pipeline * p.context * (p.data or 1))
    t = tiny.parallel
    after = layout_of(tiny, t.tensor * t.pipeline * t.context * (t.data or 1))
    yield f"{before} becomes {after} on {after.world_size} processes"
    big, small = (read_hf_config(c.model.path) for c in (config, tiny))
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "num_experts")
    changed = [f"{name} {big[name]} -> {small[name]}" for name in sizes if name in big]
    yield f"a tiny {big['model_type']} with random weights: {', '.join(changed)}"
    if tiny.samples_responses:
        reward = "a tiny reward model" if tiny.reward.model else "exact-match reward"
        yield f"rollouts from the embedded server on this machine, sums of two digits, {reward}"
    else:
        yield "rows of sums of two digits in the place of data.train, no rollouts"
    for section, value in tiny:
        for key, now in value:
            then = getattr(getattr(config, section), key)
            if isinstance(now, int | float | str) and now != then and section not in ("parallel", "data"):
                yield f"{section}.{key} {then} -> {now}"
