"""The losses of one environment, as json: `python -m tests.lanes.measured LAYOUT,... ALGORITHM,... FILE`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from mcore_rl.parallel.layout import Layout
from mcore_rl.verify.layouts.case import Case
from mcore_rl.verify.layouts.measure import measure
from mcore_rl.verify.layouts.worlds import Pools


def losses(layouts: Sequence[str], algorithms: Sequence[str]) -> dict[str, float]:
    """`layout algorithm` -> loss of the recorded problem of `verify layouts`."""
    cases = {text: Case.parse(text) for text in layouts}
    found = {}
    with Pools() as worlds:
        models = {case.model for case in cases.values()}
        recorded = {model: worlds.run(1, measure, Case(Layout(), model), (), None)[1] for model in models}
        for text, case in cases.items():
            results, _ = worlds.run(case.layout.world_size, measure, case, algorithms, recorded[case.model])
            found |= {f"{text} {name}": measured.loss for name, measured in results.items()}
    return found


def main(layouts: str, algorithms: str, file: str) -> None:
    found = losses(layouts.split(","), algorithms.split(","))
    Path(file).write_text(json.dumps({"version": metadata.version("megatron-core"), "losses": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
