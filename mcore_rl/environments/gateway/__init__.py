"""A policy behind the APIs of OpenAI and Anthropic, so that any agent that speaks them is an environment."""

from mcore_rl.environments.gateway.server import Endpoint, serve_policy

__all__ = ["Endpoint", "serve_policy"]
