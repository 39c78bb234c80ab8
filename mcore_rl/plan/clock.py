"""Seconds of one step, phase by phase: counted work over the hardware's peak, times one efficiency each.

The efficiencies are fitted to one published step and nothing else; published.py compares the model with it
and with steps that it was not fitted to.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mcore_rl.data.balance import ModelShape
from mcore_rl.parallel.layout import Layout
from mcore_rl.plan.memory import kv_bytes_per_token, weight_bytes
from mcore_rl.plan.work import PlannedStep

PEAK_FLOPS = 989e12
"""bf16 without sparsity, of one H100 SXM; fp8 is estimated as bf16"""
PEAK_BYTES = 3.35e12
"""HBM bytes per second of one H100 SXM"""
SERVER_GPUS = 8
"""GPUs of one server; a model that does not fit into half their memory needs another fleet than this one"""

LINKS = {"disk 2 GB/s": 2e9, "100 Gb/s": 12.5e9, "400 Gb/s": 50e9, "NVLink 450 GB/s": 450e9}
"""name -> bytes per second of the one link that a whole copy of the weights passes"""


@dataclass(frozen=True)
class Efficiency:
    """Share of the peak that each phase reaches."""

    train: float = 0.24
    """share of the peak FLOP/s in forward and backward, without the pipeline's bubble"""
    log_probs: float = 0.25
    """share of the peak FLOP/s in forward alone"""
    generate: float = 0.54
    """share of the HBM bytes per second while decoding"""
    publish: float = 10e9
    """bytes per second at which a new policy reaches the servers"""


@dataclass(frozen=True)
class SamplingServers:
    """The servers that sample."""

    gpus: int
    tensor: int
    """GPUs that one copy of the weights is cut over"""


@dataclass(frozen=True)
class Seconds:
    """Seconds of one step, by phase."""

    generate: float
    log_probs: float
    train: float
    publish: float

    @property
    def total(self) -> float:
        """One phase after the other, as a synchronous step runs them."""
        return sum(asdict(self).values())


def step_seconds(
    shape: ModelShape,
    parameters: int,
    layout: Layout,
    work: PlannedStep,
    fleet: SamplingServers,
    efficiency: Efficiency | None = None,
) -> Seconds:
    """Estimate one step; `parameters` of the whole model, `shape` for its FLOPs."""
    e = efficiency or Efficiency()
    forward = work.forward_flops(shape) / (layout.world_size * PEAK_FLOPS)
    passes = 4 if work.recompute == "full" else 3
    passes -= work.lora is not None  # frozen matrices get no gradient
    scoring = work.old_log_prob_share + work.reference + work.critic_flops + work.reward_flops
    scoring += work.teacher_flops
    return Seconds(
        generate=generate_seconds(shape, parameters, work, fleet, e.generate) if work.generates else 0.0,
        log_probs=forward * scoring / e.log_probs / (1 - work.bubble(layout)),
        train=forward * passes * work.epochs * (1 + work.critic_flops) / e.train / (1 - work.bubble(layout)),
        publish=weight_bytes(work.precision) * parameters / e.publish if work.generates else 0.0,
    )


def generate_seconds(
    shape: ModelShape, parameters: int, work: PlannedStep, fleet: SamplingServers, efficiency: float
) -> float:
    """Decoding reads the weights once per token of the longest response, and every sample's keys and values.

    All samples are in flight at once, the segments of each one after another: the longest response sets the
    number of decoding steps of each.
    """
    copies = max(1, fleet.gpus // fleet.tensor)
    weights = 2 * parameters * work.longest_response * work.segments / fleet.tensor
    r, p = work.response_tokens, work.prompt_tokens
    # Heads are cut, and each of them reads the whole of the latents.
    cut = fleet.tensor if shape.latent is None else 1
    cache = kv_bytes_per_token(shape) * _tokens_read(shape, p, r) * work.sequences / copies / cut
    arithmetic = work.forward_flops(shape) / (fleet.gpus * PEAK_FLOPS)
    return (weights + cache) / PEAK_BYTES / efficiency + arithmetic / efficiency


def _tokens_read(shape: ModelShape, prompt: float, response: float) -> float:
    """Cached tokens that the response's steps read, as a mean over the layers; windows end what they see."""
    everything = prompt * response + response * response / 2
    grown = min(max(shape.window - prompt, 0.0), response)  # steps until the window is full
    near = prompt * grown + grown * grown / 2 + shape.window * (response - grown)
    return everything + (near - everything) * shape.windowed / shape.layers


def publish_seconds(parameters: int, precision: str) -> dict[str, float]:
    """Seconds for one whole copy of the weights over each of LINKS."""
    return {name: weight_bytes(precision) * parameters / speed for name, speed in LINKS.items()}
