"""What is verified: a layout, and what else may change without changing a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mcore_rl.errors import LayoutError
from mcore_rl.parallel.layout import Layout

_VARIANTS: dict[str, dict[str, object]] = {
    "tied": {"model": "tied"},
    "moe": {"model": "moe"},
    "overlap": {"overlap": True},
    "recompute": {"recompute": "full"},
    "recompute-attention": {"recompute": "selective"},
    "shared": {"share_prompts": True},
}


@dataclass(frozen=True)
class Case:
    """One line of `mcore-rl verify layouts`."""

    layout: Layout
    model: str = "dense"
    """a key of problem.MODELS"""
    overlap: bool = False
    """gradient reduction during the backward pass, parameter gather during the next forward pass"""
    recompute: Literal["none", "selective", "full"] = "none"
    """as Tuning.recompute"""
    share_prompts: bool = False
    """as Batching.share_prompts; the run that layouts are compared with shares none"""

    @classmethod
    def parse(cls, text: str) -> Case:
        """`LAYOUT[:VARIANT[+VARIANT]]`, such as tp2+sp, ep2, pp2:tied or dp2:overlap+moe.

        Variants: tied, moe (implied by ep), overlap, recompute, recompute-attention, shared.

        Raises:
            LayoutError: names the part that cannot be read.
        """
        layout_text, colon, variants = text.partition(":")
        layout = Layout.parse(layout_text)
        settings: dict[str, object] = {"model": "moe"} if layout.expert > 1 else {}
        for variant in variants.split("+") if colon else ():
            if variant not in _VARIANTS:
                raise LayoutError(
                    f"layout {text!r}: unknown variant {variant!r}; known: {', '.join(_VARIANTS)}"
                )
            settings |= _VARIANTS[variant]
        if "share_prompts" in settings and (layout.context > 1 or settings.get("model") == "moe"):
            raise LayoutError(
                f"layout {text!r}: prompts are shared by dense models without context parallelism"
            )
        return cls(layout, **settings)  # type: ignore[arg-type]


LOSSES = ("loss/policy", "loss/value", "loss/reward_model")
"""metrics that are the loss: it is compared by itself, since its parts may cancel to nearly nothing"""
SMALL = ("tp2", "tp2+sp", "pp2", "cp2", "dp2", "ep2", "tp2pp2")
"""the default: a minute or two on two cores"""
ALL = (
    *("tp1", "tp2", "tp2+sp", "pp2", "pp2+vpp2", "cp2", "dp2", "ep2", "tp2ep2"),
    *(
        "tp2:tied",
        "pp2:tied",
        "tp1:shared",
        "tp2+sp:shared",
        "pp2+vpp2:shared",
        "dp2:shared",
        "tp2:recompute",
        "tp2+sp:recompute-attention",
        "dp2:overlap",
        "pp2:overlap+tied",
    ),
    *("tp2pp2", "tp2cp2+sp", "pp2cp2", "tp2dp2", "pp2dp2", "cp2dp2", "tp4", "pp4", "cp4"),
    *("tp2ep2dp2", "pp2ep2", "ep4", "pp2vpp2dp2:overlap"),
)
"""`--layouts all`: on at most four processes"""
