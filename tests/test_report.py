"""The report page: what it shows, what it leaves out, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.__main__ import main
from mcore_rl.errors import DataError
from mcore_rl.log import StepLog, read_metrics
from mcore_rl.report import write_report
from mcore_rl.report.compare import differences
from mcore_rl.report.page import render
from mcore_rl.report.picture import picture
from mcore_rl.report.plots import SECTIONS, draw_sections
from mcore_rl.report.runs import read_runs
from mcore_rl.report.summary import duration, headline, key_settings, text_table
from mcore_rl.report.svg import (
    LABEL,
    MAX_POINTS,
    Axis,
    Line,
    Reference,
    format_number,
    labels_apart,
    line_chart,
    moving_average,
    thin,
    ticks,
)
from tests.any_json import examples, json_values

SETTINGS = """
[run]
seed = {seed}
[algorithm]
name = "gspo"
[parallel]
tensor = 2
[publish]
tolerance_max = 2e-4
tolerance_p999 = 2e-5
"""


def step(n: int) -> dict[str, object]:
    return {
        "step": n,
        "reward/mean": 0.5 + n / 100,
        "loss/policy": -0.001 * n,
        "ratio/mean": 1.0,
        "ratio/min": 0.9,
        "ratio/max": 1.1,
        "clip/fraction": 0.1,
        "kl/rollout": 1e-4,
        "entropy": 0.5,
        "grad_norm": 1.0,
        "tokens": 100,
        "length/mean": 3.5,
        "length/max": 8,
        "mismatch/max_abs": 3e-5,
        "mismatch/p999": 5e-6,
        "time/rollout": 0.4,
        "time/train": 0.8,
        "time/step": 1.25,
    }


def write_run(directory: Path, steps: list[dict[str, object]], seed: int = 0) -> Path:
    (directory / "samples").mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    (directory / "resolved.toml").write_text(SETTINGS.format(seed=seed))
    lines = [
        {"step": 3, "prompt": f"{i}+1=", "response": f"<script>{i}", "label": "2", "reward": 1.0}
        for i in range(16)
    ]
    (directory / "samples" / "step_3.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    evaluated = [{"step": 0, "eval/held_out/accuracy": 0.503}, *map(step, range(1, 31))]
    evaluated[-1]["eval/held_out/accuracy"] = 0.861
    return write_run(tmp_path / "demo", evaluated)


def charts(page: str) -> dict[str, ElementTree.Element]:
    found = re.findall(r"<h3>([^<]*)</h3>.*?(<svg.*?</svg>)", page, flags=re.S)
    return {title: ElementTree.fromstring(re.sub(r" (hidden)/>", r' \1=""/>', svg)) for title, svg in found}


def test_a_whole_run_shows_every_plot_and_the_result(run_dir: Path) -> None:
    path = write_report([run_dir])
    page = path.read_text()
    assert path == run_dir / "report.html"
    assert list(charts(page)) == [
        *("Held-out accuracy", "Reward", "Response length"),
        *(
            "Loss: policy",
            "Importance ratio",
            "Clip fraction",
            "Entropy",
            "KL divergence: rollout",
            "Gradient norm",
        ),
        *("Log-prob agreement", "Step time", "Time by phase"),
        "tokens",
    ]
    assert "0.503 \u2192 0.861" in page
    assert "tolerance, largest" in page
    assert "<dt>Layout</dt><dd>TP 2</dd>" in page
    assert "8 of 16 samples" in page
    assert not list(run_dir.glob("*.partial"))


def test_a_plot_without_its_metric_is_left_out(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "sft", [{"step": n, "loss/supervised": 2.0 / n} for n in range(1, 5)])
    (directory / "resolved.toml").unlink()
    page = write_report([directory]).read_text()
    assert list(charts(page)) == ["Loss: supervised"]
    assert "<h2>Learning" not in page
    assert "<h2>Settings" not in page


def test_a_metric_that_no_plot_knows_has_one_of_its_own(tmp_path: Path) -> None:
    steps = [{**step(n), "dppo/masked": n / 10} for n in range(1, 5)]
    page = write_report([write_run(tmp_path / "own", steps)]).read_text()
    (line,) = json.loads(charts(page)["dppo/masked"].attrib["data-lines"])
    assert len(line["points"]) == 4
    assert "ratio/min" not in charts(page), "what a band shows is shown"


def test_the_page_asks_nothing_of_the_network_and_runs_only_its_own_script(run_dir: Path) -> None:
    page = write_report([run_dir]).read_text()
    assert not re.search(r"https?://|\bsrc=|\bhref=|url\(|@import", page)
    assert "<script>1" not in page, "text from a model is escaped"
    assert "&lt;script&gt;" in page
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_several_runs_share_the_plots_and_tell_what_differs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{name}/run", [*map(step, range(1, 5))], seed) for seed, name in enumerate("ab")
    ]
    page = write_report(runs, tmp_path / "both.html").read_text()
    reward = json.loads(charts(page)["Reward"].attrib["data-lines"])
    assert [line["label"] for line in reward] == ["a/run", "b/run"], "equal names get their parents"
    assert re.search(r"run\.seed.*<code>0</code>.*<code>1</code>", page)
    assert "<code>algorithm.name</code>" not in page, "equal settings are not listed"
    assert not (runs[0] / "report.html").exists()


def test_a_cut_line_is_left_out_and_a_gap_is_a_gap(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 31, "reward/mean": None, "entropy": 0.4}) + '\n{"step": 32, "rew')
    (run,) = read_runs([run_dir])
    assert run.steps[-1]["step"] == 31
    assert run.points("reward/mean")[-1] == (31.0, None)
    write_report([run_dir])


def test_a_repeated_step_counts_once(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", [step(1), step(2), {**step(2), "reward/mean": 0.25}])
    assert read_runs([directory])[0].values("reward/mean") == [0.51, 0.25]


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "rew'])
def test_without_metrics_it_says_so_and_leaves_the_old_page(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "report.html").write_text("old")
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"metrics\.jsonl: .*(run that has begun|first step)"):
        write_report([tmp_path])
    assert (tmp_path / "report.html").read_text() == "old"


def test_other_bad_input(run_dir: Path) -> None:
    with pytest.raises(DataError, match="no run directory"):
        write_report([])
    with pytest.raises(DataError, match="given twice"):
        write_report([run_dir, run_dir])
    loop = run_dir.with_name("loop")
    loop.symlink_to(loop)
    with pytest.raises(DataError, match="loop"):
        write_report([loop])
    (run_dir / "resolved.toml").write_text("seed = = 1")
    with pytest.raises(DataError, match=r"resolved\.toml: .*restore"):
        write_report([run_dir])


def test_every_plot_can_be_read_without_seeing_it(run_dir: Path) -> None:
    for title, svg in charts(write_report([run_dir]).read_text()).items():
        assert svg.attrib["role"] == "img"
        assert svg.attrib["tabindex"] == "0"
        assert re.search(r"\d", html.unescape(svg.attrib["aria-label"]).removeprefix(title))


def test_the_same_run_gives_the_same_page(run_dir: Path, tmp_path: Path) -> None:
    first, second = (write_report([run_dir], tmp_path / name).read_bytes() for name in ("1.html", "2.html"))
    assert first == second


def test_thinning_keeps_a_single_spike() -> None:
    points = [(float(i), 1.0) for i in range(10_000)]
    points[7001] = (7001.0, 99.0)
    kept = thin(points)
    assert len(kept) <= MAX_POINTS + 2
    assert (7001.0, 99.0) in kept
    assert [s for s, _ in kept] == sorted(s for s, _ in kept)


@pytest.mark.parametrize("heights", [[100.0, 100.0], [103.0, 97.0, 100.0], [186.0, 185.0, 40.0]])
def test_labels_of_near_limits_do_not_overlap(heights: list[float]) -> None:
    apart = sorted(labels_apart(heights))
    assert all(below - above >= LABEL for above, below in itertools.pairwise(apart))
    assert apart[-1] <= 186
    assert labels_apart([150.0, 20.0]) == [150.0, 20.0], "what is apart stays above its line"


def test_two_limits_on_one_line_have_two_labels() -> None:
    limits = [Reference("tolerance, max", 2e-4), Reference("tolerance, p999", 2.1e-4)]
    svg = line_chart("x", [Line("x", [(1.0, 1e-6), (2.0, 1e-4)], 0)], log=True, references=limits)
    heights = [float(y) for y in re.findall(r'<text class="reference" x="[^"]*" y="([^"]*)"', svg)]
    assert abs(heights[0] - heights[1]) >= LABEL - 0.1, "they are written to a tenth"


def test_a_log_axis_has_no_place_for_zero() -> None:
    assert line_chart("x", [Line("x", [(1.0, 0.0)], 0)], log=True) == ""
    svg = line_chart("x", [Line("x", [(1.0, 1e-6), (2.0, 0.0), (3.0, 1e-4)], 0)], log=True)
    assert (
        len(
            json.loads(ElementTree.fromstring(svg.replace(" hidden/", " hidden=''/")).attrib["data-lines"])[
                0
            ]["points"]
        )
        == 2
    )


def test_moving_average_is_the_mean_of_the_window() -> None:
    points = [(1.0, 1.0), (2.0, None), (3.0, 5.0), (4.0, 9.0)]
    assert moving_average(points, 3) == [(1.0, 1.0), (2.0, 3.0), (3.0, 7.0), (4.0, 7.0)]


@given(low=st.floats(-1e9, 1e9), span=st.floats(1e-6, 1e9))
def test_ticks_are_few_round_and_inside(low: float, span: float) -> None:
    if low + span * 1e-3 == low:
        return
    marks = ticks(Axis(low, low + span, 0.0, 1.0))
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert 1 <= len(marks) <= 8
    assert all(low - slack <= mark <= low + span + slack for mark in marks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.7023, "0.702"),
        (1.00031, "1.0003"),
        (12345.6, "12\u202f346"),
        (-2.5e-6, "\u22122.5e\u22126"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text


def test_summary_numbers(run_dir: Path) -> None:
    tiles = {fact.label: fact for fact in headline(read_runs([run_dir])[0])}
    assert tiles["Held-out accuracy"].detail == "+0.358, from start to end"
    assert tiles["Wall time"].value == "38 s"
    assert tiles["Response tokens"].value == "3\u202f000"
    assert [duration(s) for s in (41.2, 125, 12_000)] == ["41 s", "2 min 05 s", "3 h 20 min"]


def test_a_run_without_rollouts_says_its_kind_and_what_validation_came_to(tmp_path: Path) -> None:
    steps = [{"step": n, "tokens": 9, "validation/loss": 1 / n, "validation/accuracy": n / 4} for n in (1, 2)]
    run = write_run(tmp_path / "run", steps)
    settings = '[run]\nkind = "preference"\n[supervised]\nbatch_size = 16\n'
    (run / "resolved.toml").write_text(settings)
    (read,) = read_runs([run])
    tiles = {fact.label: fact.value for fact in headline(read)}
    assert tiles["Validation accuracy"] == "0.250 \u2192 0.500"
    assert tiles["Validation loss"] == "1.000 \u2192 0.500"
    assert tiles["Trained tokens"] == "18"
    assert key_settings(read.settings) == [("Kind", "preference"), ("Batch", "16 rows")]
    assert list(charts(write_report([run]).read_text()))[:2] == ["Validation accuracy", "Validation loss"]


def test_held_out_accuracy_says_of_how_many_and_dropped_prompts_have_a_tile(tmp_path: Path) -> None:
    counts = {
        "data/train/prompts": 16,
        "data/train/dropped": 12,
        "data/eval/e/prompts": 16,
        "data/eval/e/dropped": 0,
    }
    held_out = {"eval/e/accuracy": 0.5, "eval/e/sampled": 4, "eval/e/samples": 8, "eval/e/prompts": 16}
    run = write_run(tmp_path / "run", [{"step": 0} | counts | held_out, step(1) | held_out])
    tiles = {fact.label: fact for fact in headline(read_runs([run])[0])}
    assert tiles["Held-out accuracy"].detail.endswith("; 4 of 16 prompts")
    assert tiles["Prompts left out \u00b7 train"].value == "12 of 16"
    assert "Prompts left out \u00b7 eval/e" not in tiles


def test_held_out_sets_have_a_table_with_intervals_and_a_place_at_the_step_that_they_measure(
    tmp_path: Path,
) -> None:
    """An evaluation beside step 2 measures the weights of step 1; `mcore-rl eval` adds rows of its own."""

    def of_set(value: float) -> dict:
        keys = {"accuracy": value, "pass@4": value + 0.1, "pass@8": value + 0.2, "majority@8": value}
        ends = {f"{key}/{end}": v + d for key, v in keys.items() for end, d in (("low", -0.1), ("high", 0.1))}
        counts = {"sampled": 4, "samples": 32, "prompts": 16}
        return {f"eval/m/{key}": v for key, v in {**keys, **ends, **counts}.items()}

    beside = {"eval/version": 1} | of_set(0.25)
    run = write_run(
        tmp_path / "run", [step(1), step(2) | beside, step(3) | {"eval/version": 3} | of_set(0.5)]
    )
    alone = run / "evaluations" / "other"
    alone.mkdir(parents=True)
    found = {"sets": {"<b>": {"eval/<b>/accuracy": 0.125}}}
    (alone / "results.json").write_text(json.dumps(found))
    for name in ("broken", "odd"):
        (alone.parent / name).mkdir()
    (alone.parent / "broken" / "results.json").write_text('{"sets": [')
    (alone.parent / "odd" / "results.json").write_text('{"sets": {"a": 3}}')
    data = read_runs([run])[0]
    assert data.points("eval/m/accuracy") == [(1.0, 0.25), (3.0, 0.5)]
    page = render([data])
    assert "0.400 to 0.600" in page
    assert "0.150 to 0.350" not in page, "the last evaluation counts"
    assert "4 prompts, 32 samples" in page
    assert ">&lt;b&gt;</" in page
    titles = [figure.title for figure in draw_sections([data])["Learning"]]
    assert {"Held-out accuracy", "Held-out pass@k: m", "Held-out majority@k: m"} <= set(titles)
    assert not [f for fs in draw_sections([data]).values() for f in fs if f.title.startswith("eval/")]


BIG = (1e308, -1e308, 10**400, -(10**400), 5e-324, float("nan"), "text", True, None, [1], {"a": 1})


@pytest.mark.parametrize("value", BIG, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("key", ["reward/mean", "mismatch/max_abs", "time/train", "time/step", "length/max"])
def test_a_metric_that_no_chart_can_hold_is_a_gap(tmp_path: Path, key: str, value: object) -> None:
    steps = [*map(step, range(1, 4)), step(4) | {key: value}, step(5) | {key: 1e308}, step(6) | {key: -1e308}]
    run = write_run(tmp_path / "run", steps)
    assert main(["report", str(run)]) == 0
    assert headline(read_runs([run])[0])


def test_lines_that_are_no_step_are_read_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step(n) for n in range(1, 4)])
    junk = [
        b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"step": ' + b"9" * 400 + b"}",
        b"\xff",
        b"null",
    ]
    junk += [b'{"step": true}', b'{"step": "4"}', b'{"step": -1}', b'{"reward": 1}', b'{"step": 9, "a"']
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\n".join(junk))
    assert [record["step"] for record in read_runs([run])[0].steps] == [1, 2, 3]
    assert main(["report", str(run)]) == 0
    StepLog(run, resume_step=2)
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    "toml",
    [b"a = " + b"9" * 5000, b"\xff", b"a = " + b"[" * 5000, b"[run"],
)
def test_settings_that_are_not_toml_are_named(tmp_path: Path, toml: bytes, capsys) -> None:
    run = write_run(tmp_path / "run", [step(1)])
    (run / "resolved.toml").write_bytes(toml)
    assert main(["report", str(run)]) == 2
    assert f"DataError: {run}/resolved.toml: " in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path / "run", [step(1)])
    (run / "report.html").mkdir()
    (run / "report.html" / "file").touch()
    assert main(["report", str(run)]) == 75
    assert f"StorageError: {run}/report.html: " in capsys.readouterr().err


def test_what_a_terminal_would_act_on_is_written_out_in_the_page(tmp_path: Path) -> None:
    hostile = "x\x1b[2J\u202egnp\0"
    lines = [{**step(1), f"eval/{hostile}/accuracy": 0.5, hostile: 2.0}]
    runs = [write_run(tmp_path / name, lines) for name in ("a\x1b[2J\u202eb", "c")]
    (runs[0] / "samples").mkdir(exist_ok=True)
    sample = {"prompt": hostile, "response": hostile + "\nsecond", "label": hostile, "reward": 1.0}
    (runs[0] / "samples" / "step_1.jsonl").write_text(json.dumps(sample) + "\n")
    (runs[0] / "resolved.toml").write_text('"k\\u001b\\u202e" = "\\u202e"\n# \u202e\n')
    for shown in (runs[:1], runs):
        page = write_report(shown, tmp_path / "page.html").read_text()
        assert not {"\x1b", "\u202e", "\0"} & set(page)
        assert "a\\x1b[2J\\u202eb" in page
        assert "gnp\\x00" in page


def test_a_page_that_something_else_wrote_stays(tmp_path: Path, capsys) -> None:
    run = write_run(tmp_path / "run", [step(1)])
    (run / "report.html").write_text("<title>mine</title>")
    assert main(["report", str(run)]) == 2
    assert f"DataError: {run}/report.html is no page of this command" in capsys.readouterr().err
    assert (run / "report.html").read_text() == "<title>mine</title>"
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == main(["report", str(run)]) == 0


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples/step_1.jsonl"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", [step(1)])
    (run / "samples").mkdir(exist_ok=True)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(DataError, match="not a plain file"):
        write_report([run])


some_keys = st.sampled_from(
    [*step(1), "eval/a/accuracy", "eval/a/sampled", "eval/a/prompts", "data/train/dropped"]
)
some_settings = st.sampled_from(
    ["publish.tolerance_max", "optimizer.lr", "parallel.tensor", "train.steps", "x"]
)


@settings(max_examples=examples(40))
@given(
    st.lists(st.dictionaries(some_keys, json_values(), max_size=5), min_size=1, max_size=4),
    st.dictionaries(some_settings, st.integers() | st.floats() | st.just("text") | st.just([1]), max_size=3),
)
def test_any_metrics_and_settings_make_a_page_or_a_typed_error(
    tmp_path_factory, records: list[dict[str, object]], values: dict[str, object]
) -> None:
    steps = [step(n) | record for n, record in enumerate(records)]
    run = write_run(tmp_path_factory.mktemp("fuzz") / "run", steps)
    (run / "resolved.toml").write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    other = write_run(tmp_path_factory.mktemp("fuzz") / "other", [step(n) for n in range(3)])
    for runs in ([run], [run, other]):
        try:
            write_report(runs)
            text_table(read_runs(runs)[0])
            differences(*read_runs([run, other]))
        except DataError as error:
            refused = str(error)
        else:
            refused = ""
        assert not refused or str(run) in refused or "no step in common" in refused


def test_the_catalogue_has_no_metric_twice() -> None:
    keys = [key for plots in SECTIONS.values() for plot in plots for key, _ in plot.metrics]
    assert len(set(keys)) == len(keys)


def test_a_picture_stands_alone():
    lines = [Line("a < b", [(0.0, 0.2), (5.0, 0.9)], 0), Line("control", [(0.0, 0.2)], 0, faint=True)]
    svg = ElementTree.fromstring(picture("Accuracy & steps", lines, faint="learning rate 0"))
    words = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Accuracy & steps", "a < b", "thin, in the same colours: learning rate 0"} <= set(words)
    assert "control" not in words
