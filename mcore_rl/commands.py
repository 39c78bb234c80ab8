"""What each command of `mcore-rl` does: it imports what it needs when called, and returns its exit code."""

from __future__ import annotations

import argparse
import os

from mcore_rl.imports import uncollected
from mcore_rl.terminal import printable


def demo(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`mcore-rl demo [DIR] [--section.key value ...]`."""
    from mcore_rl.demo.command import demo

    return demo(arguments.directory, overrides)


def train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`mcore-rl train CONFIG.toml [--resume [WHICH] | --overwrite] [--rollouts DIR] [--replay DUMP] ...`."""
    from mcore_rl.launch.asked import leaving_when_asked

    if "RANK" in os.environ:
        return _train(arguments, overrides)
    with leaving_when_asked():
        return _train(arguments, overrides)


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from mcore_rl.config import load_config
    from mcore_rl.launch.first_look import first_look

    _check_flags(arguments)
    of_rank = "RANK" in os.environ or arguments.rehearse or arguments.replay is not None
    # A mistake is said before torch is imported.
    config = load_config(arguments.config, overrides, None if of_rank else first_look)
    with uncollected():
        from mcore_rl.launch.start import Source, launch_node, run_rank, under_torchrun

    if arguments.rehearse:
        with uncollected():
            from mcore_rl.launch.rehearse import rehearse

        return rehearse(config, arguments.rehearse_procs)
    options = {name: getattr(arguments, name) for name in ("resume", "replay", "rollouts")}
    source = (
        Source(**options) if not arguments.overwrite else Source("overwrite", rollouts=arguments.rollouts)
    )
    if under_torchrun():
        return run_rank(config, source)
    given = {f"--{name}": str(value) for name, value in options.items() if value is not None}
    flags = [part for flag in given.items() for part in flag] + ["--overwrite"] * arguments.overwrite
    return launch_node(config, source, ["train", str(arguments.config), *flags, *overrides])


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags of which one would be ignored."""
    from mcore_rl.errors import ConfigError

    a = arguments
    given = {"--rehearse": a.rehearse, "--resume": a.resume is not None, "--replay": a.replay is not None}
    given |= {"--overwrite": a.overwrite, "--rollouts": a.rollouts is not None}
    chosen = [flag for flag, is_given in given.items() if is_given]
    if len(chosen) > 1 and not ("--rollouts" in chosen and chosen[0] in ("--resume", "--overwrite")):
        raise ConfigError(f"{' and '.join(chosen)}: only one of them at a time")
    if a.rehearse_procs is not None and not a.rehearse:
        raise ConfigError("--rehearse-procs: only with --rehearse; add it, or this would be the real run")


def rollout(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`mcore-rl rollout CONFIG.toml [--section.key value ...]`; started again, it goes on."""
    from mcore_rl.config import load_config
    from mcore_rl.errors import ConfigError
    from mcore_rl.launch.first_look import first_look

    config = load_config(arguments.config, overrides, first_look)
    with uncollected():
        from mcore_rl.launch.start import run_alone

    if config.run.kind != "rl":
        raise ConfigError(f'rollout: run.kind = "{config.run.kind}" has no rollouts alone; set "rl"')
    return run_alone(config)


def samples(arguments: argparse.Namespace, _: list[str]) -> int:
    """`mcore-rl samples RUN_DIR [STEP] [--sample ID] [--limit N]`."""
    from mcore_rl.dumps.show import show_samples

    for line in show_samples(arguments.run_dir, arguments.step, arguments.sample, arguments.limit):
        print(printable(line))
    return 0


def plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`mcore-rl plan CONFIG.toml [--gpus N] [--gpu-memory GIB] [--json] [--section.key value ...]`."""
    with uncollected():
        from mcore_rl.plan.command import plan

    rest = ("command", "config", "json")
    options = {name: value for name, value in vars(arguments).items() if name not in rest}
    return plan(arguments.config, overrides, as_json=arguments.json, **options)


def doctor(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`mcore-rl doctor CONFIG.toml [--json] [--section.key value ...]`."""
    with uncollected():
        from mcore_rl.doctor import main as examine

    return examine(arguments.config, overrides, as_json=arguments.json)


def evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`mcore-rl eval CONFIG.toml|RUN_DIR [--checkpoint WHICH] [--out DIR] [--section.key value ...]`."""
    with uncollected():
        from mcore_rl.evaluate.command import evaluate

    a = arguments
    return evaluate(a.target, overrides, checkpoint=a.checkpoint, out=a.out, as_json=a.json)


def config(arguments: argparse.Namespace, _: list[str]) -> int:
    """`mcore-rl config [SECTION ...] [--markdown]`."""
    from mcore_rl.config.describe import as_markdown, describe

    text = as_markdown() if arguments.markdown else describe(arguments.sections)
    for line in text.removesuffix("\n").split("\n"):
        print(printable(line))
    return 0


def algorithms(arguments: argparse.Namespace, _: list[str]) -> int:
    """`mcore-rl algorithms [NAME] [--markdown]`."""
    from mcore_rl.algo.catalog import as_markdown, describe

    text = as_markdown() if arguments.markdown else describe(arguments.name)
    for line in text.split("\n"):
        print(printable(line))
    return 0


def serve(arguments: argparse.Namespace, _: list[str]) -> int:
    """`mcore-rl serve MODEL_DIR|RUN_DIR [--port P] [--address-file FILE] ...`: until SIGTERM or Ctrl-C."""
    from mcore_rl.talk.weights import check_target

    check_target(arguments.model_dir)
    with uncollected():
        from mcore_rl.talk.serve import serve

    return serve(arguments)


def chat(arguments: argparse.Namespace, _: list[str]) -> int:
    """`mcore-rl chat RUN_DIR|MODEL_DIR [--checkpoint WHICH] [--system TEXT] [--temperature T] ...`."""
    from mcore_rl.talk.weights import check_target

    check_target(arguments.model)
    with uncollected():
        from mcore_rl.talk.chat import chat

    options = {name: value for name, value in vars(arguments).items() if name not in ("command", "model")}
    return chat(arguments.model, **options)


def follow(arguments: argparse.Namespace, _: list[str]) -> int:
    """`mcore-rl follow SOURCE TARGET`: until SIGTERM or Ctrl-C."""
    import signal

    from mcore_rl.weights.follow import Follower

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    Follower(arguments.source, arguments.target).run()
    return 0


def convert_hf_to_mcore(arguments: argparse.Namespace, _: list[str]) -> int:
    """`mcore-rl convert hf-to-mcore SOURCE TARGET [--tp N] [--pp N] [--certify] [--json]`."""
    with uncollected():
        from mcore_rl.convert.command import hf_to_mcore, print_summary

    a = arguments
    summary = hf_to_mcore(a.source, a.target, tensor=a.tp, pipeline=a.pp, certified=a.certify)
    print_summary(a.target, summary, as_json=a.json)
    return 0


def convert_mcore_to_hf(arguments: argparse.Namespace, _: list[str]) -> int:
    """`mcore-rl convert mcore-to-hf SOURCE TARGET [--config DIR] [--shard-gb N] [--quantize fp8] ...`."""
    with uncollected():
        from mcore_rl.convert.command import mcore_to_hf, print_summary

    a = arguments
    options = {"config": a.config, "shard_gb": a.shard_gb, "quantize": a.quantize or "none"}
    options["critic"] = a.critic
    summary = mcore_to_hf(a.source, a.target, **options, certified=a.certify)
    print_summary(a.target, summary, as_json=a.json)
    return 0


def convert_merge(arguments: argparse.Namespace, _: list[str]) -> int:
    """`mcore-rl convert merge SOURCE TARGET --model DIR [--shard-gb N] [--certify] [--json]`."""
    from mcore_rl.convert.command import merge, print_summary

    a = arguments
    summary = merge(a.source, a.target, model=a.model, shard_gb=a.shard_gb, certified=a.certify)
    print_summary(a.target, summary, as_json=a.json)
    return 0


def convert_adapter(arguments: argparse.Namespace, _: list[str]) -> int:
    """`mcore-rl convert adapter SOURCE TARGET --model DIR [--json]`."""
    from mcore_rl.convert.command import adapter, print_summary

    summary = adapter(arguments.source, arguments.target, model=arguments.model)
    print_summary(arguments.target, summary, as_json=arguments.json)
    return 0


def report(arguments: argparse.Namespace, _: list[str]) -> int:
    """`mcore-rl report RUN_DIR [RUN_DIR ...] [--sample ID ...] [--follow [--port N]]`."""
    from mcore_rl.report import write_report
    from mcore_rl.report.follow import serving, wait_to_be_ended
    from mcore_rl.report.health import findings
    from mcore_rl.report.runs import read_runs
    from mcore_rl.report.summary import text_table
    from mcore_rl.timeline import write_trace

    if arguments.follow:
        with serving(arguments.run_dirs, arguments.sample, arguments.port) as address:
            print(printable(f"{address}: open it in a browser on this machine; Ctrl-C ends it"), flush=True)
            wait_to_be_ended()
        return 0
    page = write_report(arguments.run_dirs, samples=arguments.sample)
    for run in read_runs(arguments.run_dirs):
        for line in text_table(run).split("\n"):
            print(printable(line))
        for finding in findings(run):
            print(printable(f"{finding.title}: {finding.what} {finding.remedy}"))
    for run_dir in arguments.run_dirs:
        if trace := write_trace(run_dir):
            print(printable(f"{trace}: open it in ui.perfetto.dev or chrome://tracing"))
    print()
    print(printable(f"{page}: open it in a browser"))
    return 0


def verify_golden(arguments: argparse.Namespace, _: list[str]) -> int:
    """`mcore-rl verify golden DIR [--tp N] [--json]`."""
    with uncollected():
        from mcore_rl.verify.golden.command import main as golden

    options = ["--tp", str(arguments.tp), *(["--json"] if arguments.json else [])]
    return golden([str(arguments.directory), *options])


def verify_layouts(arguments: argparse.Namespace, _: list[str]) -> int:
    """`mcore-rl verify layouts [--layouts ...] [--algorithms ...] [--loss module:function] [--json]`."""
    with uncollected():
        from mcore_rl.verify.layouts.command import ALGORITHMS, LAYOUTS, WITH_OWN_LOSS
        from mcore_rl.verify.layouts.command import main as layouts

    a = arguments
    algorithms = a.algorithms or (ALGORITHMS if a.loss is None else WITH_OWN_LOSS)
    return layouts(a.layouts or LAYOUTS, algorithms, as_json=a.json, loss=a.loss)
