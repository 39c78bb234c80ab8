"""Seconds of one step, phase by phase: counted work over the hardware's peak, times one efficiency each.

The efficiencies are fitted to some published steps of dense models and of mixtures; published.py compares
the model with them and with steps that it was not fitted to. What ranks exchange is counted by exchange.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mcore_rl.data.balance import ModelShape
from mcore_rl.parallel.layout import Layout
from mcore_rl.plan.exchange import NODE, forward_exchange, replicas_exchange
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


IN_FLIGHT = 256
"""sequences that one copy of the weights decodes at once, at most"""


@dataclass(frozen=True)
class Efficiency:
    """Share of the peak that each phase of a kind of model reaches."""

    train: float
    """share of the peak FLOP/s in forward and backward, without the pipeline's bubble and the links"""
    log_probs: float
    """share of the peak FLOP/s in forward alone"""
    bytes: float
    """share of the HBM bytes per second while decoding"""
    decode: float
    """share of the peak FLOP/s while decoding"""
    layer: float
    """seconds of a layer in a decoding step, besides what is counted: launches, dispatch, all-reduces"""
    layer_across: float
    """the same where a copy of the weights spans nodes"""
    publish: float
    """bytes per second at which a new policy reaches the servers"""


DENSE = Efficiency(
    train=0.429, log_probs=0.300, bytes=0.395, decode=0.395, layer=0.0, layer_across=0.0, publish=10e9
)
MIXTURE = Efficiency(
    train=0.231,
    log_probs=0.162,
    bytes=0.395,
    decode=0.173,
    layer=8.08e-05,
    layer_across=1.08e-04,
    publish=24.4e9,
)


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
    greedy: float = 0.0
    """answers that are compared with: asked for when the samples are there, and waited for"""
    beside: bool = False
    """generation runs beside the other phases"""

    @property
    def total(self) -> float:
        """One phase after the other, as a synchronous step runs them; or the longer of the two sides."""
        others = self.greedy + self.log_probs + self.train + self.publish
        return max(self.generate, others) if self.beside else self.generate + others


def efficiency_of(shape: ModelShape) -> Efficiency:
    """By the kind of the model."""
    return MIXTURE if shape.experts else DENSE


def step_seconds(
    shape: ModelShape,
    parameters: int,
    layout: Layout,
    work: PlannedStep,
    fleet: SamplingServers,
    efficiency: Efficiency | None = None,
) -> Seconds:
    """Estimate one step; `parameters` of the whole model, `shape` for its FLOPs."""
    e = efficiency or efficiency_of(shape)
    forward = work.forward_flops(shape) / (layout.world_size * PEAK_FLOPS)
    exchanged = forward_exchange(shape, layout, work.tokens).total
    again, frozen = work.recompute == "full", work.lora is not None  # frozen matrices get no gradient
    scoring = work.old_log_prob_share + work.energy_share + work.reference + work.critic_flops
    scoring += work.reward_flops * (1 + work.greedy / work.samples) + work.teacher_flops
    rounds, running = work.epochs * (1 + work.critic_flops), 1 - work.bubble(layout)
    # A backward pass takes two forward passes' FLOPs, and sends what one sends.
    train = ((3 + again - frozen) * forward / e.train + (2 + again) * exchanged) * rounds / running
    answers = replace(work, samples=work.greedy, staleness=0)
    return Seconds(
        generate=generate_seconds(shape, parameters, work, fleet, e) if work.generates else 0.0,
        greedy=generate_seconds(shape, parameters, answers, fleet, e) if work.greedy else 0.0,
        log_probs=(forward / e.log_probs + exchanged) * scoring / running,
        train=train + (0.0 if frozen else _exposed(parameters, layout, work, train)),
        publish=weight_bytes(work.precision) * parameters / e.publish if work.generates else 0.0,
        beside=work.staleness > 0 and work.generates,
    )


def _exposed(parameters: int, layout: Layout, work: PlannedStep, train: float) -> float:
    """What the replicas' exchange takes beyond the last micro-batch's backward pass, beside which it runs."""
    updates = work.mini_batches * work.epochs
    hidden = train / updates / work.micro_batches(layout) * 2 / 3
    return updates * max(0.0, replicas_exchange(parameters, layout) - hidden)


def generate_seconds(
    shape: ModelShape, parameters: int, work: PlannedStep, fleet: SamplingServers, e: Efficiency
) -> float:
    """Decoding reads the weights once per token of the longest response, and every sample's keys and values.

    All samples are in flight at once, up to IN_FLIGHT on each copy of the weights, the segments of each one
    after another: the longest response sets the number of decoding steps of each. Beside training, the
    samples of later steps fill the batch, and so many steps share the longest response.
    """
    copies = max(1, fleet.gpus // fleet.tensor)
    r, p = work.response_tokens, work.prompt_tokens
    waves = work.samples / copies / IN_FLIGHT
    steps = max(work.longest_response / (1 + work.staleness), r * waves) * work.segments
    weights = 2 * parameters * steps / fleet.tensor
    # Heads are cut, and each of them reads the whole of the latents.
    cut = fleet.tensor if shape.latent is None else 1
    cache = kv_bytes_per_token(shape) * _tokens_read(shape, p, r) * work.sequences / copies / cut
    arithmetic = work.forward_flops(shape) / (fleet.gpus * PEAK_FLOPS)
    layer = e.layer if fleet.tensor <= NODE else e.layer_across
    return (weights + cache) / PEAK_BYTES / e.bytes + arithmetic / e.decode + steps * shape.layers * layer


def _tokens_read(shape: ModelShape, prompt: float, response: float) -> float:
    """Cached tokens that the response's steps read, as a mean over the layers; windows end what they see."""
    everything = prompt * response + response * response / 2
    grown = min(max(shape.window - prompt, 0.0), response)  # steps until the window is full
    near = prompt * grown + grown * grown / 2 + shape.window * (response - grown)
    return everything + (near - everything) * shape.windowed / shape.layers


def publish_seconds(parameters: int, precision: str) -> dict[str, float]:
    """Seconds for one whole copy of the weights over each of LINKS."""
    return {name: weight_bytes(precision) * parameters / speed for name, speed in LINKS.items()}
