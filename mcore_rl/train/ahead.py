"""Generation beside training (rollout.max_staleness of 1 and more): what every rank knows of it.

A replica's lead holds the groups in flight. Prompts are drawn by all ranks alike, from counts that all know;
a group is named after the step that it is asked for. Version v is the weights after step v.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_rl.config import Config
from mcore_rl.data.cursor import share
from mcore_rl.errors import DamagedCheckpointError
from mcore_rl.parallel.control import gather_replicas, on_leads
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout import routing
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.rollout.inflight import Group as Asked
from mcore_rl.rollout.inflight import InFlight
from mcore_rl.rollout.reply import MalformedReplyError, Reply, check_spans, check_tokens
from mcore_rl.rollout.routing import check_experts
from mcore_rl.rollout.sampler import build_group, group_request
from mcore_rl.rollout.schedule import Schedule
from mcore_rl.terminal import escaped
from mcore_rl.train.share import share_groups
from mcore_rl.types import ExpertLayers, Group, Prompt, Sample, VersionSpan

if TYPE_CHECKING:
    from mcore_rl.train.run import Run

_OF_STEP_TIMEOUT = 0.9
"""of it, a lead may wait: it names the cause before the ranks that wait for it run out of time"""


class Ahead:
    """The groups in flight of all replicas. Every method is collective, but `restore` and `close`."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        vocabulary: int,
        experts: ExpertLayers | None = None,
    ) -> None:
        self.config = config
        self.vocabulary = vocabulary
        """rows of the policy's"""
        self.experts = experts
        """of the policy, where its routing is replayed"""
        self.metrics: dict[str, float] = {}
        """of the last step: what became of all samples ever asked, and how old the trained tokens were"""
        self._prompts = {prompt.id: prompt for prompt in prompts}
        self._totals: Counter[str] = Counter()
        self._saved: list[dict[str, Any]] = []
        """groups in flight of the checkpoint that the run continues from, until they are in flight again"""
        self._lead: InFlight | None = None
        """on a replica's lead"""

    def start(self, mesh: Mesh, fleet: Fleet) -> None:
        """Open the connections of this rank, if it is a replica's lead; nothing is asked before `collect`."""
        self._mesh = mesh
        r = self.config.rollout
        schedule = Schedule(
            groups=self._share(r.prompts_per_step, mesh.dp_rank),
            extra=self._share(r.over_sampling, mesh.dp_rank),
            max_staleness=r.max_staleness,
        )
        timeout = _OF_STEP_TIMEOUT * self.config.train.step_timeout
        if mesh.is_replica_lead:
            self._lead = InFlight(fleet.dispatch(mesh.dp_rank, mesh.layout.data), schedule, timeout=timeout)

    def close(self) -> None:
        """End what is in flight."""
        if self._lead is not None:
            self._lead.close()

    # -- a step -------------------------------------------------------------------------------------------

    def collect(self, run: Run, step: int) -> list[Group]:
        """The scored groups of `step`, of all replicas, on every rank; asks before it waits for them."""
        self._ask(run, step)

        def work() -> tuple[list[Group], tuple[Counter[str], int, dict[str, str]]]:
            lead = self._of_lead()
            with run.timers("rollout"):
                taken = lead.take(step)
            with run.timers("reward"):
                groups = [
                    build_group(group, self._prompt(group), replies, run.decode)
                    for group, replies in taken.replies.items()
                ]
                scored = run.judge.by_function(groups)
            return scored, (Counter(taken.discarded.values()), len(lead.groups()), lead.lost())

        groups, counted = share_groups(run.mesh, self._prompts, work)
        run.lose({url: why for *_, lost in counted for url, why in lost.items()})
        with run.timers("reward"), run.residency.during("rewards"):
            groups = run.judge.by_model(groups, run.shape)
        discarded = sum((counts for counts, _, _ in counted), Counter())
        self._count(groups, discarded, sum(left for _, left, _ in counted))
        samples = [sample for group in groups for sample in group.samples]
        self.metrics |= staleness_metrics(samples, step - 1)
        return groups

    def _ask(self, run: Run, step: int) -> None:
        """Fill up what is in flight; the weights of step - 1 serve."""
        self._resume(step - 1)
        replicas = range(run.mesh.layout.data)
        left = self.config.train.steps - step + 1
        wanted = gather_replicas(run.mesh, on_leads(run.mesh, lambda: self._of_lead().wanted(left)))
        bound, r = self.config.rollout.max_staleness, self.config.rollout
        ahead = min(bound + 1, left)
        rounds = [(step + bound, wanted)]
        if sum(wanted) == ahead * r.prompts_per_step + r.over_sampling:  # nothing is in flight: the beginning
            own = [self._share(r.prompts_per_step, replica) for replica in replicas]
            extra = [self._share(r.over_sampling, replica) for replica in replicas]
            first = [a + b for a, b in zip(own, extra, strict=True)]
            rounds = [(step, first), *((step + i, own) for i in range(1, ahead))]
        for name, counts in rounds:
            drawn = run.cursor.next(sum(counts)) if sum(counts) else []
            end = list(accumulate(counts))[run.mesh.dp_rank]
            mine = drawn[end - counts[run.mesh.dp_rank] : end]
            asked = [self._asked(f"{prompt.id}@{name}", step - 1) for prompt in mine]
            on_leads(run.mesh, lambda asked=asked: self._of_lead().add(asked))
            self._totals["asked"] += sum(counts) * r.samples_per_prompt

    def _count(self, groups: Sequence[Group], discarded: Counter[str], left: int) -> None:
        each = self.config.rollout.samples_per_prompt
        trained = sum(len(group.samples) for group in groups)
        self._totals["trained"] += trained
        self._totals["discarded_aborted"] += len(groups) * each - trained
        for reason in ("stale", "unfinished"):
            self._totals[f"discarded_{reason}"] += discarded[reason] * each
        self.metrics = {f"async/{name}": float(count) for name, count in self._totals.items()}
        self.metrics["async/in_flight"] = float(left * each)

    # -- a publish ----------------------------------------------------------------------------------------

    def expect(self, run: Run, version: str) -> None:
        """The publish of `version` begins: every rank knows which servers were lost since the last step.

        Every lead takes back what runs on them: the publish ends all requests of those that answer again.
        """
        lost = gather_replicas(run.mesh, on_leads(run.mesh, lambda: self._of_lead().lost()))
        run.lose({url: why for part in lost for url, why in part.items()})
        on_leads(run.mesh, lambda: self._of_lead().expect(run.fleet.serving, version))

    def serve(self, run: Run) -> None:
        """The publish is verified: the servers that hold it are asked from now on, and no others."""
        fleet = run.fleet
        on_leads(run.mesh, lambda: self._of_lead().serve(fleet.serving, fleet.version))

    # -- a checkpoint -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As JSON: every group in flight, oldest first, with its replies where it has finished."""

        def work() -> list[dict[str, Any]]:
            return [
                {"id": g.id, "version": g.version, "replies": g.replies and [_saved(r) for r in g.replies]}
                for g in self._of_lead().groups()
            ]

        replicas = gather_replicas(self._mesh, on_leads(self._mesh, work))
        groups = sorted((group for replica in replicas for group in replica), key=_asked_for)
        return {"groups": groups, "totals": dict(self._totals)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, at the next `collect`.

        Raises:
            DamagedCheckpointError: a sample in flight is none that the policy can have sampled.
        """
        self._saved = list(state["groups"])
        for group in self._saved:
            _check_saved(group, self.vocabulary, self.experts)
        self._totals = Counter(state["totals"])

    def _resume(self, version: int) -> None:
        """What had finished is kept; the rest is asked again, under the seeds that its ids give it.

        So is what the run's bound, another one than that of the checkpoint, makes too old, and what is longer
        than the run's limit.
        """
        bound = self.config.rollout.max_staleness
        groups: list[Asked] = []
        for name in sorted({_asked_for(group) for group in self._saved}):
            of_step = [group for group in self._saved if _asked_for(group) == name]
            for group in share(of_step, self._mesh.dp_rank, self._mesh.layout.data):
                finished = group["replies"]
                again = is_too_old(group, version, bound) or (finished and self._unusable(group))
                if finished is None or again:
                    groups.append(self._asked(group["id"], version))
                else:
                    replies = [_reply(reply, routed=self.experts is not None) for reply in finished]
                    groups.append(self._asked(group["id"], group["version"], replies))
        if self._saved:
            on_leads(self._mesh, lambda: self._of_lead().add(groups))
        self._saved = []

    # -- small things -------------------------------------------------------------------------------------

    def _unusable(self, group: Mapping[str, Any]) -> bool:
        """Whether it was saved without routing replay, or with more tokens than this run asks for."""
        most, routed = self.config.rollout.max_new_tokens, self.experts is not None
        return (routed and _unrouted(group)) or any(_length(reply) > most for reply in group["replies"])

    def _share(self, count: int, replica: int) -> int:
        return len(share(range(count), replica, self._mesh.layout.data))

    def _of_lead(self) -> InFlight:
        if self._lead is None:
            raise RuntimeError("only a replica's lead holds groups in flight, once `start` was called")
        return self._lead

    def _prompt(self, group: str) -> Prompt:
        return self._prompts[group.rpartition("@")[0]]

    def _asked(self, group: str, version: int, replies: list[Reply] | None = None) -> Asked:
        r = self.config.rollout
        params = r.sampling_params
        one = [(self._prompt(group), group)]
        return Asked(
            group,
            version,
            group_request(one, r.samples_per_prompt, params, seed=self.config.run.seed, experts=self.experts),
            replies,
        )


def token_ages(samples: Sequence[Sample], version: int) -> list[np.ndarray]:
    """[N] of [n_i]: weight versions from the one that sampled each token to `version`."""
    return [
        np.concatenate(
            [np.zeros(0), *(np.full(s.end - s.start, version - int(s.version)) for s in sample.versions)]
        )
        for sample in samples
    ]


def staleness_metrics(samples: Sequence[Sample], version: int) -> dict[str, float]:
    """Over tokens, mean and largest age; over samples, the share that more than one version sampled."""
    ages = np.concatenate([np.zeros(0), *token_ages(samples, version)])
    mixed = [len({span.version for span in sample.versions}) > 1 for sample in samples]
    return {
        "staleness/mean": float(ages.mean()) if ages.size else 0.0,
        "staleness/max": float(ages.max(initial=0.0)),
        "staleness/mixed": float(np.mean(mixed)) if mixed else 0.0,
    }


def _asked_for(group: Mapping[str, Any]) -> int:
    """The step in a saved group's name."""
    return int(group["id"].rpartition("@")[2])


def is_too_old(saved: Mapping[str, Any], version: int, bound: int) -> bool:
    """Whether a saved group could not be trained in its step, while `version` serves."""
    return saved["version"] < max(_asked_for(saved) - 1, version) - bound


def _saved(reply: Reply) -> dict[str, Any]:
    """As JSON; tokens and log-probs as memory, in the types of a Sample: every rank holds it for a moment."""
    arrays = {
        "token_ids": np.array(reply.token_ids, np.int32),
        "log_probs": np.array(reply.log_probs, np.float32),
    } | ({} if reply.experts is None else {"experts": reply.experts})
    rest = asdict(replace(reply, token_ids=(), log_probs=(), experts=None))
    return rest | {name: routing.to_json(array) for name, array in arrays.items()}


def _unrouted(saved: Mapping[str, Any]) -> bool:
    """Whether a group was saved without routing replay."""
    return any(r.get("experts") is None and r["finish_reason"] != "abort" for r in saved["replies"])


def _length(saved: Mapping[str, Any]) -> int:
    """Tokens of a saved reply."""
    return int(np.prod(saved["token_ids"]["shape"]))


def _check_saved(group: Mapping[str, Any], vocabulary: int, of: ExpertLayers | None) -> None:
    """The rules of a server's reply, for one from a checkpoint; every rank reads all of them."""
    try:
        for saved in group["replies"] or ():
            reply = _reply(saved, routed=of is not None)
            check_tokens(reply.token_ids, reply.log_probs, vocabulary)
            check_spans(saved["versions"], len(reply.token_ids))
            if of is not None and reply.experts is not None:
                check_experts(reply.experts, of)
    except (MalformedReplyError, KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(
            f"the checkpoint's sample in flight {escaped(group.get('id'))} is none of this model "
            f"({escaped(error)}); go on from --resume previous, or from the model that it was sampled from"
        ).on_every_rank() from error


def _reply(saved: Mapping[str, Any], *, routed: bool) -> Reply:
    experts = saved.get("experts")
    return Reply(
        rid=saved["rid"],
        token_ids=tuple(routing.from_json(saved["token_ids"]).tolist()),
        log_probs=tuple(routing.from_json(saved["log_probs"]).tolist()),
        prompt_log_probs=tuple(saved["prompt_log_probs"]),
        finish_reason=saved["finish_reason"],
        versions=tuple(VersionSpan(**span) for span in saved["versions"]),
        experts=routing.from_json(experts) if routed and experts is not None else None,
    )
