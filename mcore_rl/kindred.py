"""Models that are published under a `model_type` of their own and compute what another one does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDRED: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}
"""`model_type` that transformers does not know without code of the model's own -> the one that it knows"""


def known_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`config` for transformers' from_pretrained, where it knows no class by the `model_type` of `hf`."""
    kin = KINDRED.get(str(hf.get("model_type")))
    if kin is None:
        return {}
    from transformers import AutoConfig  # seconds, which most processes spend elsewhere anyway

    return {"config": AutoConfig.for_model(kin, **{k: v for k, v in hf.items() if k != "model_type"})}
