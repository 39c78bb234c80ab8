"""Evaluation during a run: the held-out sets under the weights that were published last.

Where training waits for its samples, it waits for those of an evaluation too. Where the servers generate
beside training (`rollout.max_staleness`), an evaluation is asked after the publish of its weights and runs
beside the next step; that step's publish waits for what is left of it, since a sample of two versions would
measure neither. Its numbers are then in the record of that next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mcore_rl.data.cursor import share
from mcore_rl.log import Timers
from mcore_rl.parallel.control import on_leads, on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout.inflight import Begun, InFlight
from mcore_rl.rollout.sampler import build_group, group_request, groups_per_call
from mcore_rl.screen import SCREEN
from mcore_rl.training.evaluation_sets import EvalSet, as_lines, measure, record_of
from mcore_rl.training.generation import gather_groups
from mcore_rl.training.requests import CALLS_PER_SERVER, Sampling
from mcore_rl.training.rewards import RewardSource
from mcore_rl.training.rundir import keep_evaluation
from mcore_rl.training.servers import Servers
from mcore_rl.types import Group, Prompt

VERSION = "eval/version"
"""the metric that names the weights which were evaluated"""


@dataclass(frozen=True)
class EvalSchedule:
    """When the sets are evaluated."""

    steps: int
    """steps of the whole run"""
    every: int
    """steps between two evaluations; 0 evaluates at the start and at the end alone"""
    beside: bool
    """an evaluation runs beside the next step"""

    def due(self, step: int) -> bool:
        """Whether the policy is evaluated after `step`: at the start, at the end, and every `every` steps.

        Beside training the last step but one is left out: the record of the last has one evaluation.
        """
        if self.beside and 0 < step == self.steps - 1:
            return False
        return step in (0, self.steps) or (self.every > 0 and step % self.every == 0)

    def is_beside(self, step: int) -> bool:
        """Whether what is due after `step` runs beside the next step; that of the last step cannot."""
        return self.beside and step + 1 < self.steps


class Evaluator:
    """Evaluates the sets. Every rank has one, and every method is collective.

    Args:
        requests: of this rank, where it is a replica's lead; whoever opened them closes them.
        sources: what scores the samples, by set.
        sampling: the run's seed and decoder; a set has parameters of its own.
        reached: says what is done, so that the watchdog's clock starts again.
    """

    def __init__(
        self,
        mesh: Mesh,
        servers: Servers,
        requests: InFlight | None,
        *,
        sets: Sequence[EvalSet],
        schedule: EvalSchedule,
        sources: Mapping[str, RewardSource],
        sampling: Sampling,
        run_dir: Path,
        timers: Timers,
        reached: Callable[[str], None],
    ) -> None:
        self.sets, self.schedule = sets, schedule
        self._mesh, self._servers, self._requests = mesh, servers, requests
        self._sources = sources
        self._sampling, self._run_dir, self._timers, self._reached = sampling, run_dir, timers, reached
        self._version: int | None = None
        """step whose weights are being evaluated"""
        self._begun: dict[str, Begun] = {}
        """on a lead: what was asked, by set"""

    def after(self, step: int) -> dict[str, float]:
        """The metrics of what is evaluated after `step`; nothing where it runs beside the next step."""
        self._begin(step)
        return {} if self.schedule.is_beside(step) else self.finish()

    def resume(self, step: int) -> None:
        """After a resume behind `step`: an evaluation that ran beside the next step is asked again."""
        if self.schedule.is_beside(step):
            self._begin(step)

    def finish(self) -> dict[str, float]:
        """Wait for the evaluation that was begun; its metrics, nothing where there is none.

        Raises:
            RolloutError: on every rank: no server is left, or a set exceeds train.step_timeout.
            RewardError: on every rank: a reward or an answer could not be had.
        """
        if self._version is None:
            return {}
        found: dict[str, float] = {VERSION: float(self._version)}
        with self._timers("eval"):
            for number, one in enumerate(self.sets, 1):
                SCREEN.doing(partial(self._doing, one.name, number))
                found |= self._finish(one, self._version)
                self._reached(f"{one.name} was evaluated")
        self._version = None
        return found

    def _begin(self, step: int) -> None:
        if not self.sets or not self.schedule.due(step):
            return
        self._version = step
        serving = self._servers.fleet.serving
        calls = CALLS_PER_SERVER * len(serving)

        def ask() -> None:
            lead = self._of_lead()
            lead.keep(serving)
            for one in self.sets:
                asked, seed = self._groups(one, step), self._sampling.seed
                requests = [
                    group_request(prompt, group, one.samples, one.params, seed=seed)
                    for group, prompt in asked.items()
                ]
                per_call = groups_per_call(list(asked.values()), one.samples, one.params, calls=calls)
                self._begun[one.name] = lead.begin(requests, per_call, calls)

        with self._timers("eval"):
            on_leads(self._mesh, ask)

    def _groups(self, one: EvalSet, step: int) -> Mapping[str, Prompt]:
        """Group id -> prompt, of this replica."""
        mine = share(one.prompts, self._mesh.dp_rank, self._mesh.layout.data)
        return {f"{prompt.id}@{one.name}.{step}": prompt for prompt in mine}

    def _doing(self, name: str, number: int) -> str:
        """`evaluating sums (1 of 2): 40 of 100 calls to servers`, as far as this replica knows."""
        begun = self._begun.get(name, ())
        of_sets = f" ({number} of {len(self.sets)})" if len(self.sets) > 1 else ""
        calls = f": {sum(call.done() for call in begun)} of {len(begun)} calls to servers" if begun else ""
        return f"evaluating {name}{of_sets}{calls}"

    def _finish(self, one: EvalSet, step: int) -> dict[str, float]:
        source, prompts = self._sources[one.name], {prompt.id: prompt for prompt in one.prompts}

        def work() -> tuple[list[Group], dict[str, str]]:
            lead = self._of_lead()
            replies = lead.finish(self._begun[one.name])
            del self._begun[one.name]
            asked = self._groups(one, step).items()
            groups = [
                build_group(group, prompt, its, self._sampling.decode)
                for (group, prompt), its in zip(asked, replies, strict=True)
            ]
            return source.by_function(groups), lead.lost()

        groups, losses = gather_groups(self._mesh, prompts, work)
        self._servers.lose({url: why for lost in losses for url, why in lost.items()})
        groups = source.check_voids_and_ask_model(groups)
        return on_main(self._mesh, lambda: self._keep(one, groups, step))

    def _keep(self, one: EvalSet, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Write every sample to the set's file; the metrics."""
        decode = self._sampling.decode  # texts do not travel: what came from the leads has none
        records = [
            record_of(one, replace(sample, text=decode(sample.token_ids)))
            for group in groups
            for sample in group.samples
        ]
        keep_evaluation(self._run_dir, step, one.name, as_lines(records))
        return measure(one, records)

    def _of_lead(self) -> InFlight:
        if self._requests is None:
            raise RuntimeError("only a replica's lead asks servers")
        return self._requests
