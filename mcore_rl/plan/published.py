"""The time model beside published steps: `python -m mcore_rl.plan.published` prints the table.

The efficiencies of clock.py are fitted to the first step alone. The others, whose phases are not published,
were not looked at for the fit: their totals show how far the model carries.
"""

from __future__ import annotations

from dataclasses import dataclass

from mcore_rl.data.balance import ModelShape
from mcore_rl.parallel.layout import Layout
from mcore_rl.plan.clock import SamplingServers, Seconds, step_seconds
from mcore_rl.plan.work import PlannedStep
from mcore_rl.terminal import printable

FITTED = "NeMo-RL v0.3 performance summary: GRPO, OpenMathInstruct-2, 8 DGX-H100, bf16, Megatron backend"
HELD_OUT = "NeMo-RL v0.4 performance summary: the same, on-policy rows; totals only"


@dataclass(frozen=True)
class Step:
    """A published step: what was run, and how long it took. Prompts are not told and count as 0 tokens."""

    name: str
    shape: ModelShape
    parameters: int
    layout: Layout
    fleet: SamplingServers
    response_tokens: float
    """mean"""
    published: Seconds | float
    """per phase, or in all"""
    samples: int = 2048
    batch: int = 512
    """samples of an optimizer step"""
    longest: int = 4096
    """tokens of a sequence, and of a packed micro-batch"""

    def work(self) -> PlannedStep:
        """Old and reference log-probs are taken of every sample."""
        return PlannedStep(
            samples=self.samples,
            prompt_tokens=0.0,
            response_tokens=self.response_tokens,
            longest_response=self.longest,
            longest=self.longest,
            mini_batches=self.samples // self.batch,
            epochs=1,
            tokens_per_micro_batch=self.longest,
            precision="bf16",
            recompute="none",
            distributed_optimizer=True,
            reference=True,
            critic=None,
            critic_flops=0.0,
            reward_model=None,
            reward_flops=0.0,
            colocated=True,
            generates=True,
            old_log_prob_share=1.0,
        )

    def estimate(self) -> Seconds:
        """By the plan's time model."""
        return step_seconds(self.shape, self.parameters, self.layout, self.work(), self.fleet)


LLAMA_70B = Step(
    "Llama-3.1-70B, 64 GPUs",
    ModelShape(layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, vocab=128256, ffn=28672),
    70_553_706_496,
    Layout(tensor=4, sequence=True, pipeline=4, data=4),
    SamplingServers(gpus=64, tensor=4),
    398,
    Seconds(generate=84, log_probs=18, train=28, publish=14),
)
OTHERS = (
    Step(
        "Llama-3.1-8B, 16 GPUs",
        ModelShape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, vocab=128256, ffn=14336),
        8_030_261_248,
        Layout(pipeline=2, data=8),
        SamplingServers(gpus=16, tensor=1),
        1060,
        97.7,
    ),
    Step(
        "Qwen3-32B, 32 GPUs",
        ModelShape(layers=64, hidden=5120, heads=64, kv_heads=8, head_dim=128, vocab=151936, ffn=25600),
        32_762_123_264,
        Layout(tensor=4, sequence=True, pipeline=4, data=2),
        SamplingServers(gpus=32, tensor=4),
        3206,
        393.0,
    ),
    Step(
        "Qwen3-30B-A3B, 32 GPUs",
        ModelShape(
            layers=48, hidden=2048, heads=32, kv_heads=4, head_dim=128, vocab=151936, ffn=8 * 768, experts=128
        ),
        30_532_122_624,
        Layout(tensor=2, sequence=True, expert=8, data=16),
        SamplingServers(gpus=32, tensor=4),
        3154,
        225.0,
    ),
)


def rows() -> list[tuple[str, float, float, float]]:
    """(step and phase, published seconds, estimated seconds, relative error)."""
    found = []
    for step in (LLAMA_70B, *OTHERS):
        estimated, published = step.estimate(), step.published
        if isinstance(published, Seconds):
            phases = ("generate", "log_probs", "train", "publish", "total")
            pairs = {name: (float(getattr(published, name)), getattr(estimated, name)) for name in phases}
        else:
            pairs = {"step": (published, estimated.total)}
        found += [(f"{step.name}: {name}", p, e, e / p - 1) for name, (p, e) in pairs.items()]
    return found


def main() -> None:
    """Print the comparison as the table of docs/layouts.md."""
    print("| step | published s | estimated s | error |\n|---|---|---|---|")
    for name, published, estimated, error in rows():
        print(printable(f"| {name} | {published:g} | {estimated:.0f} | {error:+.0%} |"))


if __name__ == "__main__":
    main()
