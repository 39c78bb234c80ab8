"""What is on the device in which phase of a step.

NEEDED is the one table: training enters its phases by it (`residency.Residency.during`), and the plan counts
memory by it.
"""

from __future__ import annotations

NEEDED: dict[str, frozenset[str]] = {
    "reference": frozenset({"reference"}),
    "reward_model": frozenset({"rewards"}),
    "teacher": frozenset({"teacher"}),
    "critic": frozenset({"values", "critic", "critic step", "save"}),
    "critic_optimizer": frozenset({"critic step", "save"}),
    "optimizer": frozenset({"policy step", "save"}),
    "server_weights": frozenset({"publish", "rewards"}),
    "kv_cache": frozenset({"publish", "rewards"}),
}
"""part that may wait -> the phases that it is on the device for. `critic`: its weights and gradients. The
last two are of servers on the trainer's GPUs (training/servers.py)"""

PHASES = (
    "publish",
    "rewards",
    "reference",
    "teacher",
    "values",
    "policy",
    "policy step",
    "critic",
    "critic step",
    "save",
)
"""what a step consists of: scoring, forward and backward of a model, its optimizer's update, a checkpoint"""
