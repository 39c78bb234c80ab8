"""`mcore-rl verify layouts`: every layout against one rank, through the real Megatron-Core."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence

from mcore_rl.algo.algorithms import configure
from mcore_rl.errors import LayoutError
from mcore_rl.launch.start import under_torchrun
from mcore_rl.parallel.layout import Layout
from mcore_rl.terminal import printable
from mcore_rl.verify.layouts.case import ALL, SMALL, Case
from mcore_rl.verify.layouts.compare import LIMITS, Errors, compare, summary
from mcore_rl.verify.layouts.differences import LIMIT, ROWS, check_loss
from mcore_rl.verify.layouts.measure import measure
from mcore_rl.verify.layouts.worlds import Launched, Pools, Worlds

LAYOUTS = SMALL
WITH_OWN_LOSS = ("grpo",)
"""whose advantages and aggregation a loss of the user's own is verified with, unless told otherwise"""
ALGORITHMS = ("ppo", "grpo", "gspo", "sapo", "liteppo")
"""the default; the names in rows.LOSSES and rows.DIVERGENCES are kinds of training on rows as they are"""


def verify_layouts(
    layouts: Sequence[str],
    algorithms: Sequence[str],
    worlds: Worlds,
    *,
    loss: str | None = None,
    report: Callable[[Errors], None] = lambda errors: None,
    checked: Callable[[str, float], None] = lambda name, worst: None,
) -> list[Errors]:
    """Measure one rank per model, then every layout against it.

    Args:
        layouts: see Case.parse.
        loss: `module:function` of a policy loss in the place of the algorithms'; its gradient is compared
            with finite differences first.
        report: called with every Errors as soon as it is known.
        checked: called with the label of a loss whose finite differences agree, and their largest difference.

    Returns:
        One Errors per layout and algorithm; nothing where this process is not the main one.

    Raises:
        LayoutError: a layout that cannot be read or needs more ranks than there are.
        RankError: a rank failed.
        ConfigError: the loss cannot be loaded, or does not answer as its contract says.
        NumericsError: its gradient is not that of its value, or a row's loss depends on other rows.
    """
    if loss is not None:
        for name in algorithms:
            checked(label(name, algorithms, loss), check_loss(configure(name, loss=loss)))
    cases = {text: Case.parse(text) for text in layouts}
    for text, case in cases.items():
        if worlds.largest is not None and case.layout.world_size > worlds.largest:
            raise LayoutError(
                f"layout {text!r} needs {case.layout.world_size} ranks, torchrun started {worlds.largest}"
            )
    references = {
        model: worlds.run(1, measure, Case(Layout(), model), algorithms, None, loss)
        for model in sorted({case.model for case in cases.values()})
    }
    results: list[Errors] = []
    for text, case in sorted(cases.items(), key=lambda item: item[1].layout.world_size):
        reference, log_probs = references[case.model] or (None, [])
        answer = worlds.run(case.layout.world_size, measure, case, algorithms, log_probs, loss)
        if answer is None or reference is None:
            continue
        for name, measured in answer[0].items():
            results.append(compare(text, label(name, algorithms, loss), measured, reference[name]))
            report(results[-1])
    return results


def label(name: str, algorithms: Sequence[str], loss: str | None) -> str:
    """What the rows of `name` are called: by the user's own loss where it replaces the algorithm's.

    With several algorithms, the name of each follows; a critic has no policy loss.
    """
    if loss is None or name not in algorithms:
        return name
    own = loss.rpartition(":")[2]
    return own if len(algorithms) == 1 else f"{own}/{name}"


def main(layouts: Sequence[str], algorithms: Sequence[str], *, as_json: bool, loss: str | None = None) -> int:
    """Print a row per layout and algorithm; the exit code: 0, or 1 where an error exceeds its limit.

    Under torchrun the running ranks are used.

    Args:
        layouts: see Case.parse; ("all",) is the full list.
        as_json: the last line of stdout is one JSON object, the table goes to stderr.
        loss: see verify_layouts.
    """
    layouts = ALL if tuple(layouts) == ("all",) else layouts
    out = sys.stderr if as_json else sys.stdout
    began = time.monotonic()
    width = max(10, *(len(label(name, algorithms, loss)) for name in algorithms))
    with Launched() if under_torchrun() else Pools() as worlds:
        if worlds.is_main:
            names = " ".join(f"{name:>9}" for name in LIMITS)
            print(printable(f"{'layout':27} {'algorithm':{width}} {names}"), file=out)

        def checked(name: str, worst: float) -> None:
            if worlds.is_main:
                what = f"{ROWS} rows in float64, largest {worst:.1e}, limit {LIMIT:.0e}  ok"
                print(printable(f"{'finite differences':27} {name:{width}} {what}"), file=out, flush=True)

        results = verify_layouts(
            layouts,
            algorithms,
            worlds,
            loss=loss,
            report=lambda errors: print_row(errors, width, out),
            checked=checked,
        )
        if not worlds.is_main:
            return 0
    failed = {e.layout for e in results if e.exceeded}
    limits = " ".join(f"{limit:9.0e}" for limit in LIMITS.values())
    print(printable(f"{'limits':{28 + width}} {limits}"), file=out)
    agree = f"{len(layouts) - len(failed)} of {len(layouts)} layouts agree with one rank"
    print(printable(f"{agree}; {time.monotonic() - began:.0f} s"), file=out)
    if as_json:
        print(json.dumps(summary(layouts, results)))
    return 1 if failed else 0


def print_row(errors: Errors, width: int, out) -> None:
    """One line of the table, whose second column is `width` wide."""
    largest = (f"{errors.largest[name]:9.1e}" if name in errors.largest else f"{'':9}" for name in LIMITS)
    verdict = f"FAILED: {', '.join(errors.exceeded)}" if errors.exceeded else "ok"
    row = f"{errors.layout:27} {errors.algorithm:{width}} {' '.join(largest)}  {verdict}"
    print(printable(row), file=out, flush=True)
