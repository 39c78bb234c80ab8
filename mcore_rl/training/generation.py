"""The groups that a step trains on: asked of the servers, waited for, and given their rewards.

A replica's lead holds the groups in flight. Prompts are drawn by all ranks alike, from counts that all know;
a group is named after the step that it is asked for. Version v is the weights after step v. There is one path
for every bound: with `max_staleness` = 0 a step asks for its groups, waits for them and hands them over, and
nothing is in flight between two steps; with 1 or more the servers generate beside training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from mcore_rl.data.cursor import PromptCursor, share
from mcore_rl.errors import RolloutError
from mcore_rl.log import Timers
from mcore_rl.parallel.control import gather_replicas, on_leads
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout.inflight import InFlight, PendingGroup
from mcore_rl.rollout.reply import Reply
from mcore_rl.rollout.sampler import build_group, group_request, groups_per_call
from mcore_rl.rollout.saved import group_to_json, kept_replies, step_of
from mcore_rl.training.requests import Bounds, Sampling, share_of
from mcore_rl.training.rewards import RewardSource
from mcore_rl.training.servers import Servers
from mcore_rl.training.share import share_groups
from mcore_rl.training.staleness import staleness_metrics
from mcore_rl.types import Group, Prompt

_CALLS_PER_SERVER = 4
"""of a round that is all waited for: few, for the servers batch; not one, so that what a lost server had is
not everything"""


class Generation:
    """The groups of all replicas. Every rank has one; every method is collective, but `restore`.

    Args:
        requests: what `open_requests` gave to this rank; whoever opened it closes it.
        prompts: those that `cursor` walks.
    """

    def __init__(
        self,
        mesh: Mesh,
        servers: Servers,
        requests: InFlight | None,
        *,
        prompts: Sequence[Prompt],
        cursor: PromptCursor,
        rewards: RewardSource,
        bounds: Bounds,
        sampling: Sampling,
        timers: Timers,
    ) -> None:
        self.bounds = bounds
        self.metrics: dict[str, float] = {}
        """of the last step, where generation runs beside training: what became of all samples ever asked, and
        how old the trained tokens were"""
        self._mesh, self._servers, self._requests = mesh, servers, requests
        self._prompts = {prompt.id: prompt for prompt in prompts}
        self._cursor, self._rewards, self._sampling, self._timers = cursor, rewards, sampling, timers
        self._saved: list[Mapping[str, Any]] = []
        """groups in flight of the checkpoint that the run continues from, until they are in flight again"""
        self._totals: Counter[str] = Counter()
        self._begun = False
        """whether the groups of the steps to come, but for the last of them, were asked before"""

    # -- a step -------------------------------------------------------------------------------------------

    def collect(self, step: int) -> list[Group]:
        """The scored groups of `step`, of all replicas, on every rank; asks before it waits for them.

        Raises:
            RolloutError: on every rank, when no server is left, or all samples were aborted.
        """
        self._ask_for(step)

        def work() -> tuple[list[Group], tuple[Counter[str], int, dict[str, str]]]:
            lead = self._of_lead()
            with self._timers("rollout"):
                taken = lead.take(step)
            scored = self._scored({name: self._prompt(name) for name in taken.replies}, taken.replies)
            return scored, (Counter(taken.discarded.values()), len(lead.groups()), lead.lost())

        groups, counted = share_groups(self._mesh, self._prompts, work)
        groups = self._settle(groups, [lost for *_, lost in counted])
        discarded = sum((counts for counts, _, _ in counted), Counter())
        self._count(groups, discarded, sum(left for _, left, _ in counted))
        if self.bounds.max_staleness:
            self.metrics |= staleness_metrics([s for group in groups for s in group.samples], step - 1)
        if not any(group.samples for group in groups):
            raise RolloutError(
                f"step {step}: the servers aborted all {len(groups)} groups; see their logs"
            ).on_every_rank()
        return groups

    def evaluate(self, prompts: Sequence[Prompt], name: str) -> list[Group]:
        """One scored sample of each prompt under the present weights, in groups `<prompt id>@<name>`."""
        mine = share(prompts, self._mesh.dp_rank, self._mesh.layout.data)
        asked = {f"{prompt.id}@{name}": prompt for prompt in mine}
        sampling, serving = self._sampling, self._servers.fleet.serving

        def work() -> tuple[list[Group], dict[str, str]]:
            lead = self._of_lead()
            lead.keep(serving)
            requests = [
                group_request(prompt, group, 1, sampling.params, seed=sampling.seed)
                for group, prompt in asked.items()
            ]
            per_call = groups_per_call(mine, 1, sampling.params, calls=self._calls())
            with self._timers("rollout"):
                replies = lead.ask(requests, per_call)
            return self._scored(asked, dict(zip(asked, replies, strict=True))), lead.lost()

        groups, losses = share_groups(self._mesh, {prompt.id: prompt for prompt in prompts}, work)
        return self._settle(groups, losses)

    def _ask_for(self, step: int) -> None:
        """Fill up what is in flight; the weights of step - 1 serve."""
        self._resume(step - 1)
        left = self.bounds.steps - step + 1
        serving = self._servers.fleet.serving

        def wanted() -> int:
            self._of_lead().keep(serving)
            return self._of_lead().wanted(left)

        counts = gather_replicas(self._mesh, on_leads(self._mesh, wanted))
        for name, of_replicas in self._rounds(step, left, counts):
            drawn = self._cursor.next(sum(of_replicas)) if sum(of_replicas) else []
            end = list(accumulate(of_replicas))[self._mesh.dp_rank]
            mine = drawn[end - of_replicas[self._mesh.dp_rank] : end]
            on_leads(self._mesh, lambda mine=mine, name=name: self._ask(mine, name, step - 1))
            self._totals["asked"] += sum(of_replicas) * self.bounds.samples

    def _rounds(self, step: int, left: int, wanted: list[int]) -> list[tuple[int, list[int]]]:
        """(step that groups are asked for, how many by each replica), of all that is asked now."""
        if self._begun:
            return [(step + self.bounds.max_staleness, wanted)]
        self._begun = True
        replicas = range(self._mesh.layout.data)
        own = [share_of(self.bounds.groups, self._mesh, replica) for replica in replicas]
        extra = [share_of(self.bounds.extra, self._mesh, replica) for replica in replicas]
        first = [a + b for a, b in zip(own, extra, strict=True)]
        later = range(step + 1, step + min(self.bounds.max_staleness + 1, left))
        return [(step, first), *((name, own) for name in later)]

    def _ask(self, prompts: Sequence[Prompt], name: int, version: int) -> None:
        """On a lead: these are in flight from now on.

        A group that is waited for beside training is a call of its own, so that it is handed over when it
        has finished.
        """
        s = self._sampling
        groups = [self._pending(f"{prompt.id}@{name}", version) for prompt in prompts]
        together = groups_per_call(
            prompts, self.bounds.samples, s.params, calls=self._calls(), experts=s.experts
        )
        self._of_lead().add(groups, 1 if self.bounds.max_staleness else together)

    def _calls(self) -> int:
        servers = len(self._servers.fleet.serving)
        return _CALLS_PER_SERVER * servers if servers > 1 else 1

    def _scored(self, prompts: Mapping[str, Prompt], replies: Mapping[str, Sequence[Reply]]) -> list[Group]:
        """On a lead: the groups (id -> its prompt, its replies), with rewards where a function gives them."""
        with self._timers("reward"):
            groups = [
                build_group(name, prompts[name], its, self._sampling.decode) for name, its in replies.items()
            ]
            return self._rewards.by_function(groups)

    def _settle(self, groups: Sequence[Group], losses: Sequence[Mapping[str, str]]) -> list[Group]:
        """On all ranks: the servers that any lead has lost are lost, and a reward model gives its rewards."""
        self._servers.lose({url: why for lost in losses for url, why in lost.items()})
        with self._timers("reward"):
            return self._rewards.settle(groups)

    def _count(self, groups: Sequence[Group], discarded: Counter[str], left: int) -> None:
        each = self.bounds.samples
        trained = sum(len(group.samples) for group in groups)
        self._totals["trained"] += trained
        self._totals["discarded_aborted"] += len(groups) * each - trained
        for reason in ("stale", "unfinished"):
            self._totals[f"discarded_{reason}"] += discarded[reason] * each
        if self.bounds.max_staleness:
            self.metrics = {f"async/{name}": float(count) for name, count in self._totals.items()}
            self.metrics["async/in_flight"] = float(left * each)

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
        """As JSON: every group in flight, oldest first, with its replies where it has finished."""
        work = lambda: [group_to_json(group) for group in self._of_lead().groups()]  # noqa: E731
        replicas = gather_replicas(self._mesh, on_leads(self._mesh, work))
        groups = sorted((group for replica in replicas for group in replica), key=step_of)
        return {"groups": groups, "totals": dict(self._totals)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, at the next `collect`; no collective."""
        self._saved = list(state["groups"])
        self._totals = Counter(state["totals"])
        self._begun = bool(self._saved)

    def _resume(self, version: int) -> None:
        """What had finished is kept; the rest is asked again, under the seeds that its ids give it."""
        groups: list[PendingGroup] = []
        most = self._sampling.params["max_new_tokens"]
        bound, routed = self.bounds.max_staleness, self._sampling.experts is not None
        for name in sorted({step_of(group) for group in self._saved}):
            of_step = [group for group in self._saved if step_of(group) == name]
            for saved in share(of_step, self._mesh.dp_rank, self._mesh.layout.data):
                replies = kept_replies(
                    saved, version=version, max_staleness=bound, max_new_tokens=most, routed=routed
                )
                asked = version if replies is None else saved["version"]
                groups.append(self._pending(saved["id"], asked, replies))
        if self._saved:
            on_leads(self._mesh, lambda: self._of_lead().add(groups))
        self._saved = []

    # -- small things -------------------------------------------------------------------------------------

    def _of_lead(self) -> InFlight:
        if self._requests is None:
            raise RuntimeError("only a replica's lead holds groups in flight")
        return self._requests

    def _prompt(self, group: str) -> Prompt:
        return self._prompts[group.rpartition("@")[0]]

    def _pending(self, group: str, version: int, replies: list[Reply] | None = None) -> PendingGroup:
        s = self._sampling
        request = group_request(
            self._prompt(group), group, self.bounds.samples, s.params, seed=s.seed, experts=s.experts
        )
        return PendingGroup(group, version, request, replies)
