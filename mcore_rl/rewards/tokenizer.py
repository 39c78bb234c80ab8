"""The policy's tokenizer, for reward functions; a worker loads it when one first asks for it."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from mcore_rl.errors import ConfigError
from mcore_rl.types import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIRECTORY = "MCORE_RL_TOKENIZER"
"""environment variable of a worker: where the policy's tokenizer is"""


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the policy. Raises ConfigError in a process that is no worker of a run."""
    if DIRECTORY not in os.environ:
        raise ConfigError("mcore_rl.rewards.tokenizer: only a reward function that a run calls has one")
    from transformers import AutoTokenizer  # takes a second, which most reward functions need not spend

    return AutoTokenizer.from_pretrained(os.environ[DIRECTORY], trust_remote_code=False)


def full_text(sample: Sample) -> str:
    """The response with its special tokens, which `sample.text` leaves out."""
    return str(tokenizer().decode(np.asarray(sample.token_ids).tolist(), skip_special_tokens=False))
