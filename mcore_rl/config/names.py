"""Names of algorithms that are something else here: a kind of run, or another spelling."""

from __future__ import annotations

from collections.abc import Iterator

_PREFERENCE = ("dpo", "ipo", "orpo", "kto", "rdpo", "cdpo")
KINDS = {
    **{name: f'run.kind = "preference" and preference.loss = "{name}"' for name in _PREFERENCE},
    "cdpo": 'run.kind = "preference", preference.loss = "dpo" and preference.label_smoothing',
    "sft": 'run.kind = "sft"',
    **dict.fromkeys(("reward_model", "rm", "reward-model"), 'run.kind = "reward_model"'),
    **dict.fromkeys(("distill", "distillation", "gkd", "opd"), 'run.kind = "distill"'),
}
SPELLINGS = {
    **dict.fromkeys(
        ("reinforce_plus_plus", "reinforce_pp", "reinforceplusplus", "reinforce-plus-plus", "rpp"),
        "reinforce++",
    ),
    **dict.fromkeys(("reinforce_plus_plus_baseline", "reinforce-plus-plus-baseline"), "reinforce++-baseline"),
    **dict.fromkeys(("dr_grpo", "dr-grpo"), "drgrpo"),
    **dict.fromkeys(("lite_ppo", "lite-ppo"), "liteppo"),
    **dict.fromkeys(("gae", "ppo-gae", "ppo_gae"), "ppo"),
    "clip_cov": "clip-cov",
    "kl_cov": "kl-cov",
    "vc_ppo": "vc-ppo",
}
"""what others call an algorithm -> its name"""


def misnamed(name: str) -> Iterator[str]:
    """`algorithm.name: what, remedy` for a name that is no algorithm's, and plainly means something."""
    plain = name.lower()
    if plain in KINDS:
        yield f'algorithm.name: "{plain}" is a kind of run; set {KINDS[plain]}, and drop algorithm.name'
    elif plain in SPELLINGS:
        yield f'algorithm.name: "{SPELLINGS[plain]}" is what it is called here; set that'
