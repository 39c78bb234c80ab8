"""The time model beside published steps: `python -m mcore_rl.plan.published` prints the table.

Every H100 row of NeMo-RL's performance summaries v0.4 to v0.6 (docs/about/performance-summary.md of its
repository) and the 70B step of v0.3's. Each row says whether the efficiencies of clock.py were fitted to it,
whether it was held out of the fit, or why it is out of the model's reach. Prompts are not told and count as 0
tokens. Generation beside training has GPUs of its own: the recipes there say how many train.
"""

from __future__ import annotations

from dataclasses import dataclass

from mcore_rl.data.balance import LatentShape, ModelShape
from mcore_rl.parallel.layout import Layout
from mcore_rl.plan.clock import SamplingServers, Seconds, step_seconds
from mcore_rl.plan.work import PlannedStep
from mcore_rl.terminal import printable

FITTED, HELD_OUT = "fitted", "held out"
WITHIN = 0.15
"""largest error of a row that is fitted or held out"""
OLDER = "out of reach: {} took up to 1.6 times the step of later releases at the same shape"
FP8 = "out of reach: FP8 is planned at the speed of bf16"


@dataclass(frozen=True)
class PublishedModel:
    """A model of the summaries."""

    name: str
    shape: ModelShape
    parameters: int
    samples: int
    longest: int
    """tokens of a sequence, and of a packed micro-batch"""
    recompute: str
    """by its recipe"""


LLAMA_8B = PublishedModel(
    "Llama-3.1-8B",
    ModelShape(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, vocab=128256, ffn=14336),
    *(8_030_261_248, 2048, 4096, "full"),
)
LLAMA_70B = PublishedModel(
    "Llama-3.1-70B",
    ModelShape(layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, vocab=128256, ffn=28672),
    *(70_553_706_496, 2048, 4096, "none"),
)
QWEN_32B = PublishedModel(
    "Qwen3-32B",
    ModelShape(layers=64, hidden=5120, heads=64, kv_heads=8, head_dim=128, vocab=151936, ffn=25600),
    *(32_762_123_264, 2048, 4096, "none"),
)
QWEN_30B = PublishedModel(
    "Qwen3-30B-A3B",
    ModelShape(*(48, 2048, 32, 4, 128, 151936), ffn=8 * 768, experts=128, routed=8),
    *(30_532_122_624, 2048, 4096, "none"),
)
QWEN_235B = PublishedModel(
    "Qwen3-235B-A22B",
    ModelShape(*(94, 4096, 64, 4, 128, 151936), ffn=8 * 1536, experts=128, routed=8),
    *(235_093_634_560, 512, 8192, "full"),
)
DEEPSEEK_V3 = PublishedModel(
    "DeepSeek-V3",
    ModelShape(
        *(61, 7168, 128, 128, 192, 129280),
        ffn=(3 * 18432 + 58 * 9 * 2048) / 61,
        experts=256 * 58 / 61,
        routed=8 * 58 / 61,
        latent=LatentShape(query_rank=1536, rank=512, turned=64, key_and_value=256, value=128),
    ),
    *(671_026_419_200, 512, 1536, "full"),
)


@dataclass(frozen=True)
class Step:
    """A published step: what was run, how long it took, and what it is to the model."""

    release: str
    model: PublishedModel
    response_tokens: float
    """mean"""
    gpus: int
    server: int
    """GPUs that one copy of the servers' weights is cut over"""
    layout: str
    """of the training GPUs, but for their data-parallel degree"""
    seconds: float
    role: str
    staleness: int = 0
    training: int = 0
    """GPUs that train; 0: all of them, by turns with the servers"""
    what: str = ""

    @property
    def name(self) -> str:
        """In the table."""
        when = f"{self.staleness} off" if self.staleness else "on policy"
        return ", ".join(filter(None, (self.release, self.model.name, f"{self.gpus} GPUs", when, self.what)))

    def planned_layout(self) -> Layout:
        """With as many replicas as the training GPUs make."""
        one = Layout.parse(self.layout)
        replica = one.tensor * one.pipeline * one.context
        return Layout(
            tensor=one.tensor,
            sequence=one.tensor > 1,
            pipeline=one.pipeline,
            context=one.context,
            expert=one.expert,
            data=(self.training or self.gpus) // replica,
        )

    def work(self) -> PlannedStep:
        """Old and reference log-probs are taken of every sample; an optimizer step has 512 of them."""
        longest = self.model.longest
        return PlannedStep(
            samples=self.model.samples,
            prompt_tokens=0.0,
            response_tokens=self.response_tokens,
            longest_response=longest,
            longest=longest,
            mini_batches=self.model.samples // 512,
            epochs=1,
            tokens_per_micro_batch=longest,
            precision="bf16",
            recompute=self.model.recompute,
            distributed_optimizer=True,
            reference=True,
            critic=None,
            critic_flops=0.0,
            reward_model=None,
            reward_flops=0.0,
            colocated=not self.staleness,
            generates=True,
            old_log_prob_share=1.0,
            staleness=self.staleness,
        )

    def estimate(self) -> Seconds:
        """By the plan's time model."""
        servers = SamplingServers(self.gpus - self.training if self.training else self.gpus, self.server)
        model = self.model
        return step_seconds(model.shape, model.parameters, self.planned_layout(), self.work(), servers)


PHASES_70B = Seconds(generate=84, log_probs=18, train=28, publish=14)
"""of v0.3's 70B step, the only one whose phases were published"""
V3, V4, V5, V6 = "v0.3", "v0.4", "v0.5", "v0.6"
STEPS = (
    Step(V3, LLAMA_70B, 398, 64, 4, "tp4pp4", 144, HELD_OUT),
    Step(V4, LLAMA_8B, 1060, 16, 1, "pp2", 97.7, FITTED),
    Step(V4, LLAMA_8B, 1129, 16, 1, "pp2", 74.6, FITTED, 1, 8),
    Step(V4, QWEN_32B, 3206, 32, 4, "tp4pp4", 393, FITTED),
    Step(V4, QWEN_32B, 3207, 64, 4, "tp4pp4", 215, HELD_OUT, 1, 32),
    Step(V5, LLAMA_8B, 1019, 16, 1, "pp2", 92.8, HELD_OUT),
    Step(V5, LLAMA_8B, 1123, 16, 1, "dp1", 64.8, HELD_OUT, 1, 8),
    Step(V5, QWEN_32B, 3251, 32, 4, "tp4pp4", 376, HELD_OUT),
    Step(V5, QWEN_32B, 3252, 64, 4, "tp4pp4", 200, HELD_OUT, 1, 32),
    Step(V4, QWEN_30B, 3154, 32, 4, "tp2ep8", 225, OLDER.format(V4)),
    Step(V4, QWEN_30B, 3158, 32, 2, "ep8pp2", 244, OLDER.format(V4), 1, 16),
    Step(V4, QWEN_235B, 5671, 128, 16, "tp2cp2ep16pp8", 506, OLDER.format(V4)),
    Step(V4, QWEN_235B, 5691, 256, 8, "tp4ep16pp8", 241, HELD_OUT, 1, 128),
    Step(V4, DEEPSEEK_V3, 745, 256, 32, "ep16pp16", 154, OLDER.format(V4)),
    Step(V4, DEEPSEEK_V3, 744, 512, 32, "ep16pp16", 77.9, OLDER.format(V4), 1, 256),
    Step(V5, QWEN_30B, 3196, 32, 2, "ep8", 198, HELD_OUT),
    Step(V5, QWEN_30B, 3201, 32, 2, "ep8pp2", 154, HELD_OUT, 1, 16),
    Step(V5, QWEN_235B, 5700, 128, 16, "tp2cp2ep16pp8", 431, HELD_OUT),
    Step(V5, QWEN_235B, 5707, 256, 8, "tp4ep16pp8", 203, HELD_OUT, 1, 128),
    Step(V5, DEEPSEEK_V3, 744, 256, 32, "ep16pp16", 134, HELD_OUT),
    Step(V5, DEEPSEEK_V3, 738, 512, 32, "ep16pp16", 64.9, HELD_OUT, 1, 256),
    Step(
        *(V5, DEEPSEEK_V3, 974, 512, 64, "tp8cp4ep32pp8", 458),
        "out of reach: it samples again what has no signal, and does not say how often",
        what="DAPO",
    ),
    Step(V6, QWEN_30B, 3203, 32, 2, "ep8", 192, FITTED),
    Step(V6, QWEN_30B, 3201, 32, 2, "ep8pp2", 152, FITTED, 1, 16),
    Step(V6, QWEN_30B, 3206, 192, 2, "ep8", 34.5, HELD_OUT, 8, 128),
    Step(V6, QWEN_235B, 5698, 128, 16, "tp2cp2ep16pp8", 395, FITTED),
    Step(V6, QWEN_235B, 5713, 256, 16, "tp2cp2ep16pp8", 312, FITTED),
    Step(V6, QWEN_235B, 5721, 256, 8, "tp4ep16pp8", 231, FITTED, 1, 128),
    Step(V6, DEEPSEEK_V3, 701, 256, 32, "ep16pp16", 134, FITTED),
    Step(V6, DEEPSEEK_V3, 697, 512, 32, "ep16pp16", 111, HELD_OUT),
    Step(V6, DEEPSEEK_V3, 710, 512, 32, "ep16pp16", 64.1, FITTED, 1, 256),
    Step(V5, LLAMA_8B, 1128, 16, 1, "dp1", 53.0, FP8, 1, 8, "FP8"),
    Step(V5, DEEPSEEK_V3, 761, 512, 16, "ep16pp16", 67.6, FP8, 1, 256, "FP8"),
    Step(V6, DEEPSEEK_V3, 721, 512, 16, "ep16pp16", 59.2, FP8, 1, 256, "FP8"),
)
NOT_PLANNED = (
    "v0.6, Nemotron-3-Nano-30B-A3B, 128 GPUs, 1 off, SWE: 430 s; its Mamba layers have no FLOPs here",
)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    published: float
    estimated: float
    role: str

    @property
    def error(self) -> float:
        """Relative."""
        return self.estimated / self.published - 1

    def __str__(self) -> str:
        return (
            f"| {self.name} | {self.published:g} | {self.estimated:.3g} | {self.error:+.0%} | {self.role} |"
        )


def rows() -> list[Row]:
    """Every published step beside its estimate."""
    return [Row(step.name, step.seconds, step.estimate().total, step.role) for step in STEPS]


def main() -> None:
    """Print the comparison as the table of docs/layouts.md."""
    print("| step | published s | estimated s | error | |\n|---|---|---|---|---|")
    for row in rows():
        print(printable(str(row)))
    for line in NOT_PLANNED:
        print(printable(f"\nNot planned: {line}."))


if __name__ == "__main__":
    main()
