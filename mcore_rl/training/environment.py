"""Builds the environment of a run from its config."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from mcore_rl.config import Config
from mcore_rl.data.chat import is_read
from mcore_rl.environments.dialogue import ChatTemplate
from mcore_rl.environments.load import load_environment, load_response
from mcore_rl.environments.parsers import ServerParsers
from mcore_rl.environments.policy import RolloutLimits
from mcore_rl.environments.run import Environment, Environments
from mcore_rl.environments.tools import CALL_TOOLS, load_tools
from mcore_rl.errors import ConfigError
from mcore_rl.training.data import fewest_positions, row_format


def check_environment(config: Config) -> None:
    """Raises ConfigError where the environment of the config cannot be run, before anything is built."""
    e = config.environment
    if e.function is None:
        return
    load_environment(e.function, e.args)
    if e.function == CALL_TOOLS:
        load_tools(e.args["tools"])
    load_response(e.response_template, None)
    fewest = fewest_positions(config)
    if fewest is not None and e.max_tokens > fewest[0]:
        positions, whose = fewest
        raise ConfigError(
            f"environment.max_tokens: {e.max_tokens}, and {whose} has {positions} positions; lower it"
        )


def doubts_of_tools(config: Config, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """(what, remedy) of whatever keeps the model from the tools that an environment offers it."""
    e = config.environment
    if e.function != CALL_TOOLS or not e.args["tools"]:
        return
    if not is_read("tools", tokenizer):
        what = "the chat template has no word of tools: the model is not told of them"
        yield what, "use a template that writes `tools`"
    reads = (e.tool_call_parser, e.response_template, getattr(tokenizer, "response_template", None))
    if all(one is None for one in reads):
        what = "the tokenizer has no response template: every response is text, and no tool is ever called"
        remedy = "name one as environment.response_template, or a parser of "
        yield what, remedy + "SGLang's as environment.tool_call_parser"


def build_environments(config: Config, tokenizer: PreTrainedTokenizerBase) -> Environments | None:
    """What makes the rollouts of a lead, if the config has an environment; whoever builds it closes it.

    Raises:
        ConfigError: see check_environment.
    """
    e = config.environment
    if e.function is None:
        return None
    response = load_response(e.response_template, getattr(tokenizer, "response_template", None))
    parsers = None
    if e.tool_call_parser is not None or e.reasoning_parser is not None:
        parsers = ServerParsers(e.tool_call_parser, e.reasoning_parser)
    rows = row_format(config, needs_label=False, trained=False)
    return Environments(
        Environment(
            name=e.function,
            function=load_environment(e.function, e.args),
            template=ChatTemplate(tokenizer, rows.tools, config.data.chat_template_kwargs, response, parsers),
            limits=RolloutLimits(e.max_turns, e.max_tokens, e.timeout, e.turn_timeout),
            weights=config.reward.weights,
        )
    )
