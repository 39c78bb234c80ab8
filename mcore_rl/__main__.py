"""The `mcore-rl` command: `mcore-rl --help` lists its parts, `mcore-rl COMMAND --help` explains each."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcore_rl import __version__
from mcore_rl.commands import (
    algorithms,
    chat,
    config,
    convert_adapter,
    convert_hf_to_mcore,
    convert_mcore_to_hf,
    convert_merge,
    demo,
    doctor,
    evaluate,
    follow,
    plan,
    report,
    rollout,
    samples,
    serve,
    train,
    verify_golden,
    verify_layouts,
)
from mcore_rl.errors import EXIT_CONFIG, McoreRLError
from mcore_rl.imports import large_pages
from mcore_rl.server.options import add_options
from mcore_rl.streams import guard, printing
from mcore_rl.terminal import CommandParser, printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 (configuration or data), 70 (numerics) or 75 (worth a retry).

    It is 141 where whoever read what is printed has left, as with `| head`.
    """
    large_pages()
    try:
        return printing(lambda: _run(argv))
    except Exception as error:
        return _refused(error)
    except KeyboardInterrupt:
        return 130


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):  # who says nothing may know no command yet
        parser.print_help(sys.stderr)
        return EXIT_CONFIG
    words, overrides = _apart(sys.argv[1:] if argv is None else argv)
    arguments, rest = parser.parse_known_args(words)
    rest += overrides
    if rest and arguments.command not in (train, rollout, plan, doctor, evaluate, demo):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    guard(output=arguments.command not in (train, rollout, serve, follow, demo))
    _check_paths(arguments)
    return arguments.command(arguments, rest)


def _apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and the `--section.key value` between them, of which argparse makes a path."""
    words: list[str] = []
    overrides: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not re.match(r"--\w+\.", word):
            words.append(word)
            continue
        overrides.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
    return words, overrides


def _check_paths(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a file or directory to read that is not there, before anything is imported."""
    from mcore_rl.errors import ConfigError

    if arguments.command is doctor:  # for which it is a finding
        return
    # beside a source, the target is what the command is to make
    read = ("config", "model", "model_dir", *(() if hasattr(arguments, "source") else ("target",)))
    for name in read:
        path = getattr(arguments, name, None)
        if isinstance(path, Path) and not os.path.exists(path):
            raise ConfigError(f"{path}: No such file or directory; check the path")


def _refused(error: Exception) -> int:
    """Say what was wrong, in a line; raises what nobody foresaw."""
    from mcore_rl.training.faults.exits import typed

    known = typed(error)
    if not isinstance(known, McoreRLError):
        raise error
    print(printable(f"mcore-rl: {type(known).__name__}: {known}"), file=sys.stderr)
    return known.exit_code


def build_parser() -> argparse.ArgumentParser:
    """Arguments of every command; imports nothing heavy, so that --help is instant."""
    parser = CommandParser(prog="mcore-rl", description=__doc__)
    none = {"nargs": 0, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument("--version", action=_Version, **none, help="of mcore_rl and what it runs on")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add = commands.add_parser("demo", help="train a tiny model on this machine's CPUs: some minutes")
    where = "for everything (default %(default)s); --section.key value overrides keys of both its runs"
    add.add_argument("directory", type=Path, nargs="?", default=Path("runs/demo"), metavar="DIR", help=where)
    add.set_defaults(command=demo)

    _add_train(commands)
    _add_samples(commands)

    add = commands.add_parser("doctor", help="examine machine, config, model, data and servers before a run")
    add.add_argument("config", type=Path, metavar="CONFIG.toml", help="then --section.key value overrides")
    add.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    add.set_defaults(command=doctor)

    _add_eval(commands)

    add = commands.add_parser("plan", help="memory and time of every layout, before anything starts")
    add.add_argument("config", type=Path, metavar="CONFIG.toml", help="then --section.key value overrides")
    add.add_argument("--gpus", type=int, help="that train; default: what the config's layout needs")
    add.add_argument("--gpu-memory", type=float, default=80.0, help="GiB of each (default 80)")
    add.add_argument("--server-gpus", type=int, help="that sample; default: 8 for each of rollout.urls")
    add.add_argument("--prompt-tokens", type=float, help="mean; default: the config's limit")
    add.add_argument("--response-tokens", type=float, help="mean; default: the config's limit")
    add.add_argument("--segments", type=float, help="training sequences of a sample, mean; default: 1")
    add.add_argument("--search", action="store_true", dest="only_best", help="only the best layout, and why")
    add.add_argument("--colocated", action="store_true", help="count servers on the training GPUs")
    add.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    add.set_defaults(command=plan)

    add = commands.add_parser("config", help="every configuration key: type, default, meaning")
    add.add_argument("sections", nargs="*", metavar="SECTION", help="only these, such as rollout")
    add.add_argument("--markdown", action="store_true", help="all of them, as docs/config.md has them")
    add.set_defaults(command=config)

    add = commands.add_parser(
        "algorithms", help="every algorithm: its paper, loss and gradient, its other names"
    )
    add.add_argument("name", nargs="?", metavar="NAME", help="one of them, or a preset such as trl-grpo")
    add.add_argument("--markdown", action="store_true", help="all of them, as docs/algorithms.md has them")
    add.set_defaults(command=algorithms)

    _add_talk(commands)

    add = commands.add_parser("follow", help="keep a copy of the newest weights on a server's own machine")
    add.add_argument("source", type=Path, metavar="SOURCE", help="publish.dir of the run")
    add.add_argument(
        "target", type=Path, metavar="TARGET", help="publish.replica: where this machine keeps it"
    )
    add.set_defaults(command=follow)

    _add_convert(commands)

    add = commands.add_parser("report", help="write RUN_DIR/report.html; several runs are compared")
    add.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    add.add_argument(
        "--sample", action="append", default=[], metavar="ID", help="a dumped sample, token by token; repeat"
    )
    add.add_argument("--follow", action="store_true", help="serve it live on this machine, until Ctrl-C")
    add.add_argument("--port", type=int, default=0, metavar="N", help="of --follow (default: a free one)")
    add.set_defaults(command=report)

    _add_verify(commands)
    return parser


class _Version(argparse.Action):
    """Prints what a report of an error should say."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import platform
        from importlib.metadata import PackageNotFoundError, version

        print(printable(f"mcore_rl {__version__}, Python {platform.python_version()}"))
        for package in ("megatron-core", "torch", "transformer-engine", "transformers"):
            try:
                print(printable(f"{package} {version(package)}"))
            except PackageNotFoundError:
                print(printable(f"{package}: not installed"))
        parser.exit()


def _add_train(commands: Any) -> None:
    add = commands.add_parser("train", help="train by a config; under torchrun as a rank, else on this node")
    add.add_argument("config", type=Path, metavar="CONFIG.toml", help="then --section.key value overrides")
    add.add_argument("--rehearse", action="store_true", help="the same, tiny, on the CPUs of this machine")
    add.add_argument("--rehearse-procs", type=int, metavar="N", help="processes of a rehearsal (default 8)")
    add.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="latest|previous|PATH",
        help="continue after a checkpoint of the run",
    )
    add.add_argument("--overwrite", action="store_true", help="begin where run.dir holds a run, which goes")
    add.add_argument(
        "--replay",
        type=Path,
        metavar="DUMP",
        help="run a recorded micro-batch alone: RUN_DIR/numerics/step_N",
    )
    add.add_argument(
        "--rollouts",
        type=Path,
        metavar="DIR",
        help="train on rollouts that were kept (rollout.dump, or `mcore-rl rollout`), without servers",
    )
    add.set_defaults(command=train)


def _add_samples(commands: Any) -> None:
    add = commands.add_parser("rollout", help="sample and score train.steps steps into dumps, no trainer")
    add.add_argument("config", type=Path, metavar="CONFIG.toml", help="then --section.key value overrides")
    add.set_defaults(command=rollout)

    add = commands.add_parser("samples", help="rollouts that were kept, down to every token")
    add.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="of rollout.dump or `mcore-rl rollout`")
    add.add_argument("step", type=int, nargs="?", metavar="STEP", help="list the samples of this step")
    add.add_argument("--sample", metavar="ID", help="show this one, token by token")
    add.add_argument("--limit", type=int, default=50, metavar="N", help="samples listed (default 50)")
    add.set_defaults(command=samples)


def _add_eval(commands: Any) -> None:
    add = commands.add_parser("eval", help="sample and score the held-out sets, without training")
    add.add_argument(
        "target",
        type=Path,
        metavar="CONFIG.toml|RUN_DIR",
        help="a config, whose model.path is meant, or a run's newest weights; then overrides",
    )
    add.add_argument(
        "--checkpoint",
        metavar="latest|previous|PATH",
        help="other weights: a training checkpoint, or a Hugging Face directory",
    )
    add.add_argument("--out", type=Path, metavar="DIR", help="default: RUN_DIR/evaluations/NAME")
    add.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    add.set_defaults(command=evaluate)


def _add_talk(commands: Any) -> None:
    add = commands.add_parser("serve", help="serve a model over OpenAI's, Anthropic's and SGLang's APIs")
    add_options(add, "MODEL_DIR|RUN_DIR")
    add.set_defaults(command=serve)

    add = commands.add_parser("chat", help="talk to a model; piped, an answer for every line")
    add.add_argument(
        "model", type=Path, metavar="RUN_DIR|MODEL_DIR", help="a run's newest weights, or a model"
    )
    add.add_argument("--checkpoint", metavar="latest|previous|PATH", help="other weights of the run")
    add.add_argument("--system", metavar="TEXT", help="what the system says first")
    add.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest (default %(default)s)")
    add.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of an answer (%(default)s)")
    add.add_argument("--threads", type=int, default=2, help="CPU threads of the model (default %(default)s)")
    add.set_defaults(command=chat)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser("convert", help="models between Hugging Face and Megatron's torch_dist")
    directions = convert.add_subparsers(required=True, metavar="DIRECTION")
    add = directions.add_parser("hf-to-mcore", help="safetensors to torch_dist, which any layout loads")
    add.add_argument(
        "--tp", type=int, default=1, help="with --pp: write tp x pp files, which any layout reads"
    )
    add.add_argument("--pp", type=int, default=1)
    add.set_defaults(command=convert_hf_to_mcore)
    _add_conversion(add)
    add = directions.add_parser("mcore-to-hf", help="torch_dist, or a training checkpoint, to safetensors")
    add.add_argument("--config", type=Path, help="HF directory of config.json, if SOURCE has none")
    add.add_argument("--shard-gb", type=float, default=5.0, help="largest file, in 10^9 bytes (default: 5)")
    add.add_argument("--quantize", choices=["fp8"], help="FP8 in blocks of 128 x 128, for SGLang")
    add.add_argument("--critic", action="store_true", help="of a training checkpoint, the critic")
    add.set_defaults(command=convert_mcore_to_hf)
    _add_conversion(add)
    of = "directory of the model that the adapters in SOURCE are of"
    add = directions.add_parser("merge", help="adapters, of a checkpoint or PEFT's, joined with their model")
    add.add_argument("--model", type=Path, required=True, help=of)
    add.add_argument("--shard-gb", type=float, default=5.0, help="largest file, in 10^9 bytes (default: 5)")
    add.set_defaults(command=convert_merge)
    _add_conversion(add)
    add = directions.add_parser("adapter", help="adapters of a checkpoint, in PEFT's format")
    add.add_argument("--model", type=Path, required=True, help=of)
    add.set_defaults(command=convert_adapter)
    _add_target(add)


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser("verify", help="prove the maths and the layouts on this machine")
    checks = verify.add_subparsers(required=True, metavar="CHECK")
    add = checks.add_parser("golden", help="float64 golden cases through the library's own functions")
    add.add_argument("directory", type=Path)
    add.add_argument("--tp", type=int, default=1, help="vocab-parallel over this many processes")
    add.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    add.set_defaults(command=verify_golden)
    add = checks.add_parser("layouts", help="every layout against one rank, through the real Megatron-Core")
    add.add_argument("--layouts", type=_names, help="such as tp2,pp2cp2,pp2:tied; or all")
    add.add_argument("--algorithms", type=_names, help="such as gspo,ppo")
    add.add_argument("--loss", metavar="module:function", help="a policy loss of your own, in their place")
    add.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    add.set_defaults(command=verify_layouts)


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    _add_target(parser)
    parser.add_argument("--certify", action="store_true", help="compare the logits of both sides first")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=Path, metavar="TARGET", help="a new directory")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    sys.exit(main())
