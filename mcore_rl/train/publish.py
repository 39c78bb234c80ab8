"""Publish new weights and prove that every server has them, before anything is sampled from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch

from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import WeightSyncError
from mcore_rl.model.step import forward
from mcore_rl.parallel.control import on_main, reduce_maxima
from mcore_rl.rollout.dispatch import no_server_left
from mcore_rl.train.batch import pack_share
from mcore_rl.train.colocated import bring_back, restart_ended
from mcore_rl.weights.transport import server_log_probs

if TYPE_CHECKING:
    from mcore_rl.train.run import Run

PROBE_TOKENS = 4096
"""of a sequence: other weights show at once, and a server holds logits for every token that it scores"""


def publish(run: Run, step: int, sequences: Iterable[Sequence[int]]) -> dict[str, float | str]:
    """Publish version `step` and compare log-probs of `sequences`, Megatron's against every server's.

    The same tokens are also scored by the servers BEFORE the update: `publish/stale_max_abs`, how far the
    previous weights are from the new ones on these tokens, shows that the comparison can tell them apart.
    Below float32 rounding hides one step's change; there `publish/moved_max_abs`, by how much the publish
    changed a server's own log-probs, says that it arrived. Servers that have released their memory hold no
    previous weights to compare.

    Raises:
        WeightSyncError: on every rank, when a server's log-probs are not those of the new weights.
        RolloutError: on every rank, when no server is left.
    """
    version = str(step)
    if run.ahead is not None:
        run.ahead.expect(run, version)
    with run.timers("publish"):
        probe = probe_of(sequences, run.config.publish.probe_sequences)
        stale = _scores(run, probe, f"{version}-before") if step and not run.fleet.released else {}
        restart_ended(run)
        bring_back(run, "weights")
        away = dict(run.fleet.standing.lost)
        failed = run.transport.publish(run.policy, run.fleet, version)
        run.lose(failed)
        bring_back(run, "kv_cache")
        fresh = _scores(run, probe, f"{version}-after")
        difference = _largest_differences(run, probe, [*fresh.values(), *stale.values()])
    moved = {url: _change(fresh[url], stale[url]) for url in fresh.keys() & stale.keys()}
    for url in (url for url in moved if moved[url] == 0 < max(moved.values())):
        run.step_log.event("server_unmoved", url=url, version=version)
    differences, before = dict(zip(fresh, difference, strict=False)), max(difference[len(fresh) :], default=0)
    check_close(version, differences, before, run.config.publish.tolerance_max)
    if run.ahead is not None:
        run.ahead.serve(run)
    for url in away.keys() & fresh.keys():
        run.step_log.event("server_returned", url=url, version=version)
    metrics: dict[str, float | str] = {
        "weight_version": version,
        "publish/probe_max_abs": max(difference[: len(fresh)]),
        "rollout/servers": len(run.fleet.serving),
    }
    metrics |= {"publish/stale_max_abs": max(difference[len(fresh) :])} if stale else {}
    return metrics | ({"publish/moved_max_abs": min(moved.values())} if moved else {})


def probe_of(sequences: Iterable[Sequence[int]], count: int) -> list[Sequence[int]]:
    """What is compared: the first `count` sequences of two tokens or more, each up to PROBE_TOKENS.

    Less their last token: a server that scores a full context has no room for the one it must sample.
    """
    cut = (s[: max(2, min(len(s) - 1, PROBE_TOKENS))] for s in sequences if len(s) > 1)
    return list(islice(cut, count))


def _scores(run: Run, probe: Sequence[Sequence[int]], tag: str) -> dict[str, list[list[float]]]:
    """Of every server that serves: url -> [sequences][tokens - 1]. Servers that do not answer are lost."""
    scores, failed = on_main(run.mesh, lambda: server_log_probs(run.fleet.serving, probe, tag))
    run.lose(failed)
    if not scores:
        raise no_server_left(run.fleet.standing.lost).on_every_rank()
    return scores


def _largest_differences(
    run: Run, probe: Sequence[Sequence[int]], scores: list[list[list[float]]]
) -> list[float]:
    """Largest |Megatron - server| of each entry of `scores`, over the rows of all ranks."""
    sequences = [TokenSequence(tokens[:1], tokens[1:]) for tokens in probe]
    fields = {str(i): score for i, score in enumerate(scores)}
    batches = pack_share(sequences, fields, run.shape, run.mesh)
    worst = {name: torch.tensor(-torch.inf, dtype=torch.float64) for name in fields}
    for batch, head in forward(run.policy, batches, temperature=1.0):
        for name in fields if head.log_prob.numel() else ():
            gap = (head.log_prob - batch.fields[name]).abs().max().double()
            worst[name] = torch.maximum(worst[name], gap.cpu())
    reduced = reduce_maxima(run.mesh, worst)
    return [reduced[name].item() for name in fields]


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
