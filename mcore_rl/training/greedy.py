"""The reward of a greedy answer to every prompt of a step, which ReMax compares the samples with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mcore_rl.data.cursor import share
from mcore_rl.log import Timers
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout.inflight import InFlight
from mcore_rl.rollout.sampler import build_group, group_request, groups_per_call
from mcore_rl.training.generation import gather_groups
from mcore_rl.training.requests import CALLS_PER_SERVER, Sampling
from mcore_rl.training.rewards import RewardSource
from mcore_rl.training.servers import Servers
from mcore_rl.types import Group, Prompt


@dataclass(frozen=True)
class GreedyAnswers:
    """Asks the servers for one answer at temperature 0 to each prompt, and scores it; it is not trained."""

    mesh: Mesh
    servers: Servers
    requests: InFlight | None
    """of this rank, where it is a replica's lead; whoever opened them closes them"""
    rewards: RewardSource
    sampling: Sampling
    timers: Timers

    def of(self, groups: Sequence[Group]) -> dict[str, float]:
        """Group id -> reward of the greedy answer to its prompt; none where it got none. Collective.

        The servers have the weights that were published last. A baseline may be of any weights: it follows
        from the prompt alone, and leaves the expected gradient as it is.

        Raises:
            RolloutError, RewardError: on every rank; as Evaluator.finish.
        """
        prompts = {f"{group.id}.greedy": group.samples[0].prompt for group in groups if group.samples}
        mine = {name: prompts[name] for name in share(list(prompts), self.mesh.dp_rank, self._replicas)}
        with self.timers("rollout"):
            found, losses = gather_groups(
                self.mesh, {prompt.id: prompt for prompt in prompts.values()}, lambda: self._ask(mine)
            )
        self.servers.lose({url: why for lost in losses for url, why in lost.items()})
        rewarded = self.rewards.check_voids_and_ask_model(found)
        answers = {s.id.rpartition(".greedy/")[0]: s for group in rewarded for s in group.samples}
        return {name: s.reward for name, s in answers.items() if not s.void and s.reward is not None}

    @property
    def _replicas(self) -> int:
        return self.mesh.layout.data

    def _ask(self, mine: dict[str, Prompt]) -> tuple[list[Group], dict[str, str]]:
        """On a lead: the scored answers, and which servers it has lost."""
        lead, serving, seed = self.requests, self.servers.fleet.serving, self.sampling.seed
        if lead is None:
            raise RuntimeError("only a replica's lead asks servers")
        lead.keep(serving)
        params = {**self.sampling.params, "temperature": 0.0}
        asked = [group_request(prompt, name, 1, params, seed=seed) for name, prompt in mine.items()]
        calls = CALLS_PER_SERVER * len(serving)
        replies = lead.finish(
            lead.begin(asked, groups_per_call(list(mine.values()), 1, params, calls=calls), calls)
        )
        groups = [
            build_group(name, prompt, its, self.sampling.decode)
            for (name, prompt), its in zip(mine.items(), replies, strict=True)
        ]
        return self.rewards.by_function(groups), lead.lost()
