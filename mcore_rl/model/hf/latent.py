"""The latent attention (MLA) that config.json asks for, or a refusal by the name of the field.

Source: arXiv 2405.04434, section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mcore_rl.errors import ConfigError

FIELDS = frozenset(
    {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim"}
)
"""fields of config.json that only families with latent attention have"""
NORM_EPS = 1e-6
"""of the norms of latents: DeepSeek's code and transformers have it written into them, whatever config.json
tells for the other norms"""


@dataclass(frozen=True)
class Latent:
    """Keys and values come from one small vector of a token, its latent, and one turned key of all heads."""

    query_rank: int | None
    """width of the vector that queries come from; None where they come from the hidden state"""
    rank: int
    """width of the vector that keys and values come from"""
    plain: int
    """channels of a head's query and key that are not turned"""
    turned: int
    """those that are; the key's are the same in all heads"""
    value: int
    """channels of a head's value"""

    @property
    def head(self) -> int:
        """Channels of a head's query and key."""
        return self.plain + self.turned

    @property
    def cached(self) -> int:
        """The latent and the turned key."""
        return self.rank + self.turned


def read_latent(hf: Mapping[str, Any], where: str) -> Latent:
    """The latent attention of a config.json whose fields have their types.

    Raises:
        ConfigError: two fields contradict each other; KeyError: one is missing.
    """
    latent = Latent(
        query_rank=hf.get("q_lora_rank"),
        rank=hf["kv_lora_rank"],
        plain=hf["qk_nope_head_dim"],
        turned=hf["qk_rope_head_dim"],
        value=hf["v_head_dim"],
    )
    if latent.turned % 2:
        raise ConfigError(
            f"{where}: qk_rope_head_dim = {latent.turned} is odd, and rotary embeddings turn "
            "pairs; correct it"
        )
    heads = hf["num_attention_heads"]
    # transformers writes the first two of them beside what they follow from
    implied = {
        "head_dim": ("qk_rope_head_dim", latent.turned),
        "qk_head_dim": ("qk_nope_head_dim + qk_rope_head_dim", latent.head),
        "num_key_value_heads": ("num_attention_heads", heads),
    }
    for name, (source, value) in implied.items():
        if hf.get(name, value) != value:
            raise ConfigError(
                f"{where}: {name} = {hf[name]} contradicts {source} = {value}: with latent attention every "
                "head has a key and a value of its own; correct the one that is wrong"
            )
    return latent
