"""The groups that a step trains on: asked of the servers, waited for, and given their rewards.

A replica's lead holds the groups in flight. Every rank knows which these are, in the order of asking, and
draws prompts alike; a group is named after the step that it is asked for. Version v is the weights after step
v. There is one path for every bound: with `max_staleness` = 0 a step asks for its groups, waits for them and
hands them over, and nothing is in flight between two steps; with 1 or more the servers generate beside
training. Where groups without a signal are replaced, a step takes the next oldest in flight in their place,
and as many are asked anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain, count
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from mcore_rl.data.cursor import share
from mcore_rl.errors import RolloutError
from mcore_rl.log import Timers
from mcore_rl.parallel.control import gather_replicas, on_leads
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rewards.outcome import turn_ends
from mcore_rl.rollout.columns import pack_groups, unpack_groups
from mcore_rl.rollout.inflight import InFlight, PendingGroup, Queue, Replies
from mcore_rl.rollout.sampler import build_group, group_request, groups_per_call
from mcore_rl.rollout.saved import group_to_json, kept_replies, kept_rollouts, step_of
from mcore_rl.training.dynamic_sampling import FilteredGroups, live_samples
from mcore_rl.training.prompt_source import PromptSource
from mcore_rl.training.requests import CALLS_PER_SERVER, RolloutSizes, Sampling
from mcore_rl.training.rewards import RewardSource
from mcore_rl.training.servers import Servers
from mcore_rl.training.stale_tokens import stale_tokens, without_stale_tokens
from mcore_rl.types import Group, Prompt, Sample, VersionSpan


class Generation:
    """The groups of all replicas. Every rank has one; every method is collective, but `restore`.

    Args:
        requests: what `open_requests` gave to this rank; whoever opened it closes it.
        reached: says that the step goes on, after each time that its groups were replaced.
    """

    def __init__(
        self,
        mesh: Mesh,
        servers: Servers,
        requests: InFlight | None,
        *,
        source: PromptSource,
        rewards: RewardSource,
        sizes: RolloutSizes,
        sampling: Sampling,
        timers: Timers,
        reached: Callable[[str], None],
    ) -> None:
        self.sizes = sizes
        self.metrics: dict[str, float] = {}
        """of the last step: void samples, what was replaced; and where generation runs beside training, what
        became of all samples ever asked, and how old the trained tokens were"""
        self._mesh, self._servers, self._requests = mesh, servers, requests
        self._source, self._rewards, self._sampling, self._timers = source, rewards, sampling, timers
        self._reached = reached
        self._queue = Queue(
            groups=sizes.groups,
            extra=sizes.extra,
            max_staleness=sizes.max_staleness,
            replicas=mesh.layout.data,
        )
        self._saved: list[Mapping[str, Any]] = []
        """groups in flight of the checkpoint that the run continues from, until they are in flight again"""
        self._totals: Counter[str] = Counter()
        self._too_old = 0
        """tokens of this step that are not trained"""
        self._resumed: dict[str, float] = {}
        """what became of rollouts in flight, for the first step after a resume"""
        self._begun = False
        """the first `max_staleness` steps ahead were asked for; from then on a step asks for the newest"""

    # -- a step -------------------------------------------------------------------------------------------

    def collect(self, step: int) -> list[Group]:
        """The scored groups of `step`, of all replicas, on every rank; asks before it waits for them.

        Raises:
            RolloutError: on every rank, when no server is left, or all samples were aborted.
            NoSignalError: on every rank, when too many groups had no signal; see FilteredGroups.
        """
        self._resume(step - 1)
        filtered = FilteredGroups(self.sizes.groups, self.sizes.most_sampled, by_parts=self.sizes.by_parts)
        while filtered.missing:
            self._ask_for(step, filtered)
            groups = self._within_bound(self._take(filtered.missing), step)
            self._source.measure(groups)
            filtered.add(groups)
            if not any(group.samples for group in filtered.groups):
                raise RolloutError(
                    f"step {step}: the servers aborted all {len(filtered.groups)} groups; see their logs"
                ).on_every_rank()
            filtered.check(step)
            if filtered.missing:
                self._reached(f"{len(filtered.groups)} groups of step {step} were sampled")
        self._count(filtered, self._discard(step))
        self._source.keep({prompt_of(group) for group in self._queue})
        if self.sizes.max_staleness:
            alive = [s for group in filtered.kept for s in group.samples if not s.void]
            self.metrics |= staleness_metrics(alive, step - 1)
        return filtered.kept

    def _take(self, groups: int) -> list[Group]:
        """The next of all in flight, scored: the oldest, but for those that `extra` lets overtake them."""
        mine = self._queue.oldest(groups)[self._mesh.dp_rank]

        def work() -> tuple[list[Group], dict[str, str]]:
            lead = self._of_lead()
            with self._timers("rollout"):
                replies = lead.take(mine)
            return self._with_rewards(replies), lead.lost()

        taken, losses = gather_groups(self._mesh, self._source.prompts, work)
        self._queue.remove(group.id for group in taken)
        return self._complete(taken, losses)

    def _within_bound(self, groups: list[Group], step: int) -> list[Group]:
        """Without the tokens that are too old for `step`, where rollouts may outlive the bound."""
        if self.sizes.outlived == "drop":
            return groups
        kept = [without_stale_tokens(group, step - 1 - self.sizes.max_staleness) for group in groups]
        self._too_old += sum(stale_tokens(*pair) for pair in zip(groups, kept, strict=True))
        return kept

    def _discard(self, step: int) -> Counter[str]:
        """How many groups are in flight no more since no later step could train them, by the reason."""
        if not len(self._queue):
            return Counter()
        replicas = gather_replicas(
            self._mesh, on_leads(self._mesh, lambda: self._forget(self._of_lead().discard(step)))
        )
        discarded = {name: why for replica in replicas for name, why in replica.items()}
        self._queue.remove(discarded)
        return Counter(discarded.values())

    def _ask_for(self, step: int, filtered: FilteredGroups) -> None:
        """Fill up what is in flight, for what `step` lacks and the steps to come; its weights serve."""
        serving = self._servers.fleet.serving
        on_leads(self._mesh, lambda: self._of_lead().keep(serving))
        for name, asked in self._rounds(step, filtered.missing):
            prompts = self._source.next(asked, step)
            drawn = named(prompts, name, {*self._queue, *(group.id for group in filtered.groups)})
            counts = self._queue.spread(asked)
            self._queue.ask(drawn, counts)
            end = list(accumulate(counts))[self._mesh.dp_rank]
            mine = drawn[end - counts[self._mesh.dp_rank] : end]
            on_leads(self._mesh, lambda mine=mine: self._ask(mine, step - 1))
            self._totals["asked"] += asked * self.sizes.samples

    def _rounds(self, step: int, missing: int) -> list[tuple[int, int]]:
        """(step that groups are asked for, how many), of all that is asked now."""
        bound, steps = self.sizes.max_staleness, self.sizes.steps
        wanted = self._queue.wanted(steps - step + 1, missing)
        if self._begun:
            return [(step + bound, wanted)]
        self._begun = True
        own, later = self.sizes.groups, range(step + 1, min(step + bound, steps) + 1)
        return [(step, wanted - own * len(later)), *((name, own) for name in later)]

    def _ask(self, names: Sequence[str], version: int) -> None:
        """On a lead: these are in flight from now on.

        A group that is waited for beside training is a call of its own, so that it is handed over when it
        has finished.
        """
        s = self._sampling
        groups = [self._pending(name, version) for name in names]
        prompts = [self._prompt(name) for name in names]
        together = groups_per_call(
            prompts, self.sizes.samples, s.params, calls=self._calls(), experts=s.experts
        )
        one_by_one = self.sizes.max_staleness or s.streams
        self._of_lead().add(groups, 1 if one_by_one else together, arrived=self._begin_scoring)

    def _calls(self) -> int:
        servers = len(self._servers.fleet.serving)
        return CALLS_PER_SERVER * servers if servers > 1 else 1

    def _begin_scoring(self, name: str, replies: Replies) -> None:
        """On the thread of a lead's requests: all samples of a group have come."""
        self._rewards.begin_by_function(name, self._maker(name, replies))

    def _maker(self, name: str, replies: Replies) -> Callable[[], Group]:
        return partial(build_group, name, self._prompt(name), replies, self._sampling.decode)

    def _with_rewards(self, replies: Mapping[str, Replies]) -> list[Group]:
        """On a lead: the groups (id -> its replies), with rewards where a function gives them."""
        with self._timers("reward"):
            begun = {name: self._maker(name, its) for name, its in replies.items()}
            return self._rewards.finish_by_function(begun)

    def _forget(self, discarded: Mapping[str, str]) -> dict[str, str]:
        self._rewards.forget(list(discarded))
        return dict(discarded)

    def _complete(self, groups: Sequence[Group], losses: Sequence[Mapping[str, str]]) -> list[Group]:
        """On all ranks: the servers that any lead has lost are lost, and a reward model gives its rewards."""
        self._servers.lose({url: why for lost in losses for url, why in lost.items()})
        with self._timers("reward"):
            scored = self._rewards.check_voids_and_ask_model(groups)
        self._rewards.check_parts(scored)
        return scored

    def _count(self, filtered: FilteredGroups, discarded: Counter[str]) -> None:
        each, groups = self.sizes.samples, [*filtered.kept, *filtered.dropped]
        sampled = sum(len(group.samples) for group in groups)
        self._totals["trained"] += live_samples(filtered.kept)
        self._totals["discarded_aborted"] += len(groups) * each - sampled
        self._totals["discarded_no_signal"] += live_samples(filtered.dropped)
        self._totals["discarded_void"] += sampled - live_samples(groups)
        for reason in ("stale", "unfinished"):
            self._totals[f"discarded_{reason}"] += discarded[reason] * each
        self.metrics = filtered.metrics()
        if self._sampling.plays:
            rewritten = on_leads(self._mesh, lambda: self._of_lead().rewritten())
            self.metrics |= rollout_shapes(filtered.kept)
            if self.sizes.outlived != "drop":
                self.metrics["environment/too_old"] = float(self._too_old)
            self._too_old = 0
            self.metrics |= self._resumed
            self._resumed = {}
            self.metrics["environment/rewritten"] = float(sum(gather_replicas(self._mesh, rewritten)))
        if self.sizes.max_staleness:
            self.metrics |= {f"async/{name}": float(count) for name, count in self._totals.items()}
            self.metrics["async/in_flight"] = float(len(self._queue) * each)

    # -- a publish ----------------------------------------------------------------------------------------

    def expect(self, version: str) -> None:
        """The publish of `version` begins: every rank knows which servers were lost since the last step.

        Every lead takes back what runs on them: the publish ends all requests of those that answer again.
        """
        lost = gather_replicas(self._mesh, on_leads(self._mesh, lambda: self._of_lead().lost()))
        self._servers.lose({url: why for part in lost for url, why in part.items()})
        serving = self._servers.fleet.serving
        on_leads(self._mesh, lambda: self._of_lead().expect(serving, version))

    def serve(self) -> None:
        """The publish is verified: the servers that hold it are asked from now on, and no others."""
        fleet = self._servers.fleet
        on_leads(self._mesh, lambda: self._of_lead().serve(fleet.serving, fleet.version))

    # -- a checkpoint -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Every group in flight as JSON, oldest first, with its replies where it has finished."""
        work = lambda: [group_to_json(group) for group in self._of_lead().groups()]  # noqa: E731
        replicas = gather_replicas(self._mesh, on_leads(self._mesh, work))
        saved = {group["id"]: group for replica in replicas for group in replica}
        return {
            "groups": [saved[name] for name in self._queue],
            "totals": dict(self._totals),
            "measured": self._source.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, at the next `collect`; no collective."""
        self._saved = list(state["groups"])
        self._totals = Counter(state["totals"])
        self._source.restore(state.get("measured", {}))
        self._begun = bool(self._saved)

    def _resume(self, version: int) -> None:
        """What had finished is kept; the rest is asked again, under the seeds that its ids give it."""
        groups: list[PendingGroup] = []
        most = self._sampling.params["max_new_tokens"]
        bound, routed = self.sizes.max_staleness, self._sampling.experts is not None
        for name in sorted({step_of(group) for group in self._saved}):
            of_step = [group for group in self._saved if step_of(group) == name]
            shares = [
                share(of_step, replica, self._mesh.layout.data) for replica in range(self._mesh.layout.data)
            ]
            self._queue.ask([group["id"] for group in of_step], [len(its) for its in shares])
            for saved in shares[self._mesh.dp_rank]:
                replies = kept_replies(
                    saved,
                    version=version,
                    max_staleness=bound,
                    max_new_tokens=most,
                    routed=routed,
                    played=self._prompt(saved["id"]) if self._sampling.plays else None,
                )
                played: Mapping[str, Any] = {}
                if replies is None and self._sampling.plays:
                    played = self._kept_rollouts(saved, version)
                asked = saved["version"] if played or replies is not None else version
                groups.append(self._pending(saved["id"], asked, replies, played))
        if self._saved:
            if self._sampling.plays:
                self._resumed = self._count_resumed(version)
            on_leads(self._mesh, lambda: self._of_lead().add(groups, arrived=self._begin_scoring))
        self._saved = []

    def _kept_rollouts(self, saved: Mapping[str, Any], version: int) -> Mapping[str, Any]:
        prompt, bound = self._prompt(saved["id"]), self.sizes.max_staleness
        return kept_rollouts(saved, version=version, max_staleness=bound, prompt=prompt)

    def _count_resumed(self, version: int) -> dict[str, float]:
        """How many rollouts in flight of all replicas go on, or had ended, and how many begin again.

        What a rollout that begins again had sampled is void: it counts as such, and its sample as asked anew.
        """
        unfinished = [saved for saved in self._saved if saved["replies"] is None]
        resumed = sum(len(self._kept_rollouts(saved, version)) for saved in unfinished)
        again = len(unfinished) * self.sizes.samples - resumed
        self._totals.update(asked=again, discarded_void=again)
        return {"environment/resumed": float(resumed), "environment/begun_again": float(again)}

    # -- small things -------------------------------------------------------------------------------------

    def _of_lead(self) -> InFlight:
        if self._requests is None:
            raise RuntimeError("only a replica's lead holds groups in flight")
        return self._requests

    def _prompt(self, group: str) -> Prompt:
        return self._source.prompts[prompt_of(group)]

    def _pending(
        self,
        group: str,
        version: int,
        replies: Replies | None = None,
        played: Mapping[str, Any] = MappingProxyType({}),
    ) -> PendingGroup:
        s = self._sampling
        request = group_request(
            self._prompt(group), group, self.sizes.samples, s.params, seed=s.seed, experts=s.experts
        )
        return PendingGroup(group, version, replace(request, resumed=played), replies)


def prompt_of(group: str) -> str:
    """The id of the prompt that a group is of; see `named`."""
    return group.rpartition("@")[0]


def named(prompts: Sequence[Prompt], step: int, taken: Collection[str]) -> list[str]:
    """Ids of new groups, asked for `step`: `<prompt id>@<step>`, and `<prompt id>@<step>.<n>` of later ones.

    Args:
        taken: ids that others have. The prompts are different ones.
    """
    names = chain([str(step)], (f"{step}.{n}" for n in count(1)))
    of_name = ([f"{prompt.id}@{name}" for prompt in prompts] for name in names)
    return next(ids for ids in of_name if not any(id in taken for id in ids))


T = TypeVar("T")


def gather_groups(
    mesh: Mesh, prompts: Mapping[str, Prompt], work: Callable[[], tuple[list[Group], T]]
) -> tuple[list[Group], list[T]]:
    """Run `work` on the lead of every replica: (scored groups, anything small); collective.

    Returns, the same on every rank, the groups of all replicas, in data-parallel order and without texts,
    and what else each lead returned. An exception on one lead is raised on every rank.

    Args:
        prompts: id -> prompt, of all that the groups of any replica may be of.
    """

    def packed():
        groups, rest = work()
        return pack_groups(groups), rest

    replicas = gather_replicas(mesh, on_leads(mesh, packed))
    groups = [group for columns, _ in replicas for group in unpack_groups(columns, prompts)]
    return groups, [rest for _, rest in replicas]


def token_ages(samples: Sequence[Sample], version: int) -> list[np.ndarray]:
    """[N] of [m_i]: weight versions from the one that sampled each token to `version`."""
    return [
        np.concatenate([np.zeros(0), *(np.full(s.end - s.start, version - int(s.version)) for s in spans)])
        for spans in map(_spans, samples)
    ]


def rollout_shapes(groups: Sequence[Group]) -> dict[str, float]:
    """Over the samples of an environment that are alive, mean turns and training sequences of one."""
    alive = [sample for group in groups for sample in group.samples if not sample.void]
    return {
        "environment/turns": float(np.mean([len(turn_ends(sample)) for sample in alive])),
        "environment/segments": float(np.mean([len(sample.segments) for sample in alive])),
    }


def staleness_metrics(samples: Sequence[Sample], version: int) -> dict[str, float]:
    """Over tokens, mean and largest age; over samples, the share that more than one version sampled."""
    ages = np.concatenate([np.zeros(0), *token_ages(samples, version)])
    mixed = [len({span.version for span in _spans(sample)}) > 1 for sample in samples]
    return {
        "staleness/mean": float(ages.mean()) if ages.size else 0.0,
        "staleness/max": float(ages.max(initial=0.0)),
        "staleness/mixed": float(np.mean(mixed)) if mixed else 0.0,
    }


def _spans(sample: Sample) -> list[VersionSpan]:
    return [span for segment in sample.segments for span in segment.versions]
