"""A taskset of verifiers: sums, of which the last word of the answer is looked at."""

from __future__ import annotations

from collections.abc import Iterable

import verifiers.v1 as vf

__all__ = ["Sums"]


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=2.0)
    async def correct(self, trace: vf.Trace) -> float:
        return float(self.data.answer in (trace.last_reply or ""))

    @vf.reward
    async def length(self, trace: vf.Trace) -> float:
        return -0.01 * len(trace.last_reply or "")


class Sums(vf.Taskset[SumTask]):
    def load(self) -> Iterable[SumTask]:
        for left in range(2, 6):
            yield SumTask(SumData(prompt=f"{left}+{left}?", answer=str(2 * left)), self.config.task)
