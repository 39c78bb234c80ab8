"""Publish new weights and prove that every server has them, before anything is sampled from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import WeightSyncError
from mcore_rl.model.build import Model
from mcore_rl.model.step import forward
from mcore_rl.parallel.control import on_main, reduce_maxima
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout.dispatch import no_server_left
from mcore_rl.training.adapter_share import adapter_share, check_share
from mcore_rl.training.batch import Batching, pack_share
from mcore_rl.training.generation import Generation
from mcore_rl.training.mismatch import tolerances_of
from mcore_rl.training.servers import Servers
from mcore_rl.training.trainer import Trainer
from mcore_rl.weights.transport import Transport, server_log_probs

ServerScores = Mapping[str, list[list[float]]]
"""url -> [sequences][tokens - 1] log-probs of the probe"""
PROBE_TOKENS = 4096
"""tokens of a sequence: other weights show at once, and a server holds logits for all that it scores"""
LEAST_PROBE_TOKENS = 64
"""of a step of any size: each token's log-prob depends on every weight but the other tokens' embeddings"""


@dataclass(frozen=True)
class Publisher:
    """What hands new weights to the servers. Every rank has one."""

    trainer: Trainer
    servers: Servers
    transport: Transport
    """how versions reach the servers"""
    generation: Generation
    """asks those that hold the version from then on"""

    def publish(
        self, step: int, sequences: Iterable[Sequence[int]], trained: int | None = None
    ) -> dict[str, float | str]:
        """Publish version `step` and compare log-probs of `sequences`, Megatron's against every server's.

        The same tokens are also scored by the servers BEFORE the update: `publish/stale_max_abs`, how far the
        previous weights are from the new ones on these tokens, shows that the comparison can tell them apart.
        Below float32 rounding hides one step's change; there `publish/moved_max_abs`, by how much the publish
        changed a server's own log-probs, says that it arrived. Servers that have released their memory hold
        no previous weights to compare. Collective.

        Args:
            trained: tokens of the step, of which publish.probe_share at most is compared; unset, all that
                publish.probe_sequences gives.

        Raises:
            WeightSyncError: on every rank, when a server's log-probs are not those of the new weights, or
                those of the frozen model without its adapters.
            RolloutError: on every rank, when no server is left.
        """
        version, trainer, servers = str(step), self.trainer, self.servers
        self.generation.expect(version)
        with trainer.timers("publish"):
            settings = trainer.config.publish
            room = None if trained is None else max(LEAST_PROBE_TOKENS, int(settings.probe_share * trained))
            probe = probe_of(sequences, settings.probe_sequences, room)
            previous = step > 0 and not servers.fleet.released
            before = measure(trainer.mesh, servers, probe, f"{version}-before") if previous else {}
            lost = send(self.transport, trainer.policy, servers, version)
            after = measure(trainer.mesh, servers, probe, f"{version}-after")
            gaps = differences(trainer.policy, trainer.shape, probe, after, before)
        moved = changes(after, before)
        for url in unmoved(moved):
            trainer.step_log.event("server_unmoved", url=url, version=version)
        limit = tolerances_of(trainer.config, trainer.policy.arch.layers).largest
        check_close(version, gaps.after, gaps.largest_before, limit)
        share = adapter_share(trainer.policy, trainer.shape, probe, after)
        check_share(version, share)
        self.generation.serve()
        for url in lost & after.keys():
            trainer.step_log.event("server_returned", url=url, version=version)
        metrics: dict[str, float | str] = {
            "weight_version": version,
            "publish/probe_max_abs": max(gaps.after.values()),
            "rollout/servers": len(servers.fleet.serving),
        }
        metrics |= {"publish/stale_max_abs": gaps.largest_before} if before else {}
        metrics |= {"publish/adapter_share": min(one.share for one in share.values())} if share else {}
        return metrics | ({"publish/moved_max_abs": min(moved.values())} if moved else {})


def probe_of(sequences: Iterable[Sequence[int]], count: int, room: int | None = None) -> list[Sequence[int]]:
    """What is compared: the first `count` sequences of two tokens or more, each up to PROBE_TOKENS.

    Less their last token: a server that scores a full context has no room for the one it must sample. Beyond
    `room` tokens in all nothing is taken; the sequence that reaches it is cut.
    """
    found: list[Sequence[int]] = []
    for one in islice((s for s in sequences if len(s) > 1), count):
        left = PROBE_TOKENS if room is None else min(PROBE_TOKENS, room - sum(map(len, found)))
        if left < 2:
            break
        found.append(one[: max(2, min(len(one) - 1, left))])
    return found


def measure(mesh: Mesh, servers: Servers, probe: Sequence[Sequence[int]], tag: str) -> ServerScores:
    """The log-probs of the probe by every server that serves; collective. Those that give none are lost."""
    fleet = servers.fleet
    adapter = fleet.adapter_of(fleet.version)
    scores, failed = on_main(mesh, lambda: server_log_probs(fleet.serving, probe, tag, adapter))
    servers.lose(failed)
    if not scores:
        raise no_server_left(fleet.status.lost).on_every_rank()
    return scores


def send(transport: Transport, policy: Model, servers: Servers, version: str) -> set[str]:
    """Every server that answers takes the weights; collective. Returns those that were lost before."""
    servers.restart_ended()
    servers.bring_back("weights")
    lost = set(servers.fleet.status.lost)
    servers.lose(transport.publish(policy, servers.fleet, version))
    servers.bring_back("kv_cache")
    return lost


@dataclass(frozen=True)
class Gaps:
    """Largest differences of servers' log-probs to those of the trainer's present weights."""

    after: Mapping[str, float]
    """by url, under the weights that were published"""
    before: Mapping[str, float]
    """by url, under the weights before"""

    @property
    def largest_before(self) -> float:
        """The largest difference before, over all servers; 0 where none was asked."""
        return max(self.before.values(), default=0.0)


def differences(
    policy: Model, shape: Batching, probe: Sequence[Sequence[int]], after: ServerScores, before: ServerScores
) -> Gaps:
    """Compare with the trainer's log-probs of the probe, in one forward pass; collective."""
    asked = {("after", url): score for url, score in after.items()}
    asked |= {("before", url): score for url, score in before.items()}
    fields = {str(number): score for number, score in enumerate(asked.values())}
    sequences = [TokenSequence(tokens[:1], tokens[1:]) for tokens in probe]
    batches = pack_share(sequences, fields, shape, policy.mesh)
    worst = {name: torch.tensor(-torch.inf, dtype=torch.float64) for name in fields}
    for batch, head in forward(policy, batches, temperature=1.0):
        for name in fields if head.log_prob.numel() else ():
            gap = (head.log_prob - batch.fields[name]).abs().max().double()
            worst[name] = torch.maximum(worst[name], gap.cpu())
    reduced = reduce_maxima(policy.mesh, worst)
    found = dict(zip(asked, (reduced[name].item() for name in fields), strict=True))
    return Gaps(
        after={url: found["after", url] for url in after},
        before={url: found["before", url] for url in before},
    )


def changes(after: ServerScores, before: ServerScores) -> dict[str, float]:
    """By how much the publish changed the log-probs of each server that was asked before and after it."""
    return {url: _change(after[url], before[url]) for url in after.keys() & before.keys()}


def unmoved(moved: Mapping[str, float]) -> list[str]:
    """The servers whose log-probs did not change at all, while those of another one did."""
    largest = max(moved.values(), default=0.0)
    return [url for url, change in moved.items() if change == 0 < largest]


def _change(after: Sequence[Sequence[float]], before: Sequence[Sequence[float]]) -> float:
    """Largest |difference| of two scores of the same sequences."""
    pairs = zip(after, before, strict=True)
    return max((abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True)), default=0.0)


def check_close(version: str, differences: Mapping[str, float], stale: float, limit: float) -> None:
    """Raises WeightSyncError, on every rank, where a server (url -> its difference) has other weights.

    Args:
        stale: the largest difference to the previous weights, 0 where there are none.
    """
    for url, difference in differences.items():
        if not 0 <= difference <= limit:  # neither a NaN nor a comparison of nothing may pass
            raise WeightSyncError(
                f"{url} reports version {version}, but its log-probs differ from the trainer's by up to "
                f"{difference:.2e} (publish.tolerance_max = {limit:g}; those of the previous weights by "
                f"{stale:.2e}): it does not hold the published weights, or computes in a precision that the "
                "tolerance does not allow for. See its log; raise publish.tolerance_max only for the latter"
            ).on_every_rank()
