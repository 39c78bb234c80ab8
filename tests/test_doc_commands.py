"""Every command of the pages is run here, by a test that is named, or says what it needs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.doc_commands import (
    COVERED,
    FENCE,
    PAGES,
    RUN,
    DocCommand,
    all_commands,
    commands_of,
    files_of,
    without_comment,
)
from tests.e2e.ranks import Ranks
from tests.sources import ROOT

INLINE = re.compile(r"`((?:make|python|bash) [^`=][^`]*)`")
"""commands in running text, whose parts must be there"""
SMALL = ("--train", "40", "--eval", "5", "--layers", "1", "--hidden", "64")
"""of examples/arithmetic.py: the model of the session's server"""
SUPERVISED = ("--parallel.tensor", "1", "--train.steps", "1", "--supervised.batch_size", "4")
SAMPLED = (
    *(
        "--rollout.prompts_per_step",
        "4",
        "--rollout.samples_per_prompt",
        "2",
        "--rollout.max_new_tokens",
        "4",
    ),
    *("--algorithm.mini_batches", "1", "--checkpoint.every", "1", "--rollout.dump", "1"),
)
STAND_INS = {"runs/other/checkpoints/step_40": "runs/mine/checkpoints/step_2"}


# --- every command has somebody who runs it ---------------------------------------------------------------


def test_every_command_is_run_or_covered_or_says_what_it_needs() -> None:
    found = all_commands()
    assert len(found) > 50
    nobodys = [f"{one.page}: {one.text}" for one in found if one.is_run and one.page not in RUN]
    assert nobodys == [], "add to COVERED what runs its like, or say in its comment what it needs"


def test_what_covers_a_command_is_there_and_covers_one() -> None:
    found = all_commands()
    for page, table in COVERED.items():
        assert page in {path.name for path in PAGES}
        for beginning, test in table.items():
            file, _, name = test.partition("::")
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), test
            assert any(one.page == page and one.text.startswith(beginning) for one in found), beginning


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_commands_within_the_text_name_is_there(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for text in INLINE.findall(FENCE.sub("", page.read_text())):
        program, *words = text.split()
        assert not missing(program, words, targets), text


def missing(program: str, words: Sequence[str], targets: Sequence[str]) -> bool:
    """Whether a target, module or script is not there."""
    if program == "make":
        return any(word not in targets for word in words if "=" not in word)
    if words[0] == "-m":
        file = ROOT / words[1].replace(".", "/")
        return "/" in words[1] or not (file.is_dir() or file.with_suffix(".py").is_file())
    return not (ROOT / words[0]).is_file()


def test_a_command_of_nobody_is_seen() -> None:
    """The controls."""
    text = "```bash\nmcore-rl train new.toml  # soon\nmcore-rl plan new.toml  # needs GPUs\nmake test\n```\n"
    text += "```\nmcore-rl doctor \\\n  '#1.toml'\n```\n```python\nmcore_rl\n```\n"
    found = list(commands_of("faq.md", text))
    assert [one.text for one in found if one.is_run] == [
        "mcore-rl train new.toml",
        "mcore-rl doctor '#1.toml'",
    ]
    assert without_comment("curl a#b  # c") == ("curl a#b", "# c")
    assert missing("make", ["demos"], ["demo"])
    assert missing("python", ["-m", "benchmarks.nothing"], [])


# --- those that are run -----------------------------------------------------------------------------------


class Workshop:
    """Directories in which the commands of a page are run, with what the page takes for granted."""

    def __init__(self, ranks: Ranks, folder: Path, url: str, root: Path) -> None:
        self._ranks, self._folder, self._url, self._root = ranks, folder, url, root

    def directory(self, page: Path, runs: Path | None = None) -> Path:
        """A new one: the files that the page shows, else the README's, and `runs` that are there already."""
        made = self._root / page.stem
        made.mkdir()
        (made / "examples").symlink_to(ROOT / "examples")
        for source in (ROOT / "README.md", page):
            for name, text in files_of(source):
                (made / name).write_text(text)
        model = made / "path" / "to" / "hf_model"
        shutil.copytree(self._folder / "policy", model)
        template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        (model / "chat_template.jinja").write_text(template)
        write_verl(self._folder / "train.jsonl", made / "train.parquet")
        if runs is not None:
            shutil.copytree(runs, made / "runs")
        return made

    def run(self, command: DocCommand, directory: Path) -> str:
        """What it says, of one that ends well."""
        program, *words = [STAND_INS.get(word, word) for word in shlex.split(command.text)]
        if program == "python":
            done = self._ranks.run(*words, *SMALL, world=0, cwd=directory)
        else:
            assert program.endswith("mcore-rl"), f"nothing here runs {command.text}"
            done = self._ranks.run(*words, *self._small(words), world=int(words[0] == "train"), cwd=directory)
        assert done.returncode == 0, f"{command.text}: {done.stderr}"
        return done.stderr

    def _small(self, words: Sequence[str]) -> list[str]:
        """What makes it a matter of seconds."""
        urls = ["--rollout.urls", json.dumps([self._url])]
        if "examples/sft_tiny.toml" in words:
            return [*SUPERVISED]
        if words[0] == "train":
            return [*urls, *SAMPLED, "--train.steps", "3" if "--resume" in words else "2"]
        return {"doctor": [*urls, *SAMPLED, "--train.steps", "2"], "eval": urls}.get(words[0], [])


def write_verl(rows: Path, file: Path) -> None:
    """Rows as verl's own scripts write them."""
    problems = [json.loads(line) for line in rows.read_text().splitlines()]
    made = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": problem["prompt"]}],
            "reward_model": {"style": "rule", "ground_truth": problem["label"]},
        }
        for problem in problems
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), file)


@pytest.fixture(scope="module")
def workshop(
    ranks: Ranks, folder: Path, server_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Workshop:
    return Workshop(ranks, folder, server_url, tmp_path_factory.mktemp("pages"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("e2e")
def test_the_commands_of_these_pages_do_what_they_say(workshop: Workshop) -> None:
    """In order, each page in a directory of its own; the report is of the runs of the README's commands."""
    runs: Path | None = None
    for name in RUN:
        (page,) = (path for path in PAGES if path.name == name)
        directory = workshop.directory(page, runs if name == "report.md" else None)
        said = {
            one.text: workshop.run(one, directory)
            for one in all_commands()
            if one.page == name and one.is_run
        }
        assert said, name
        if name == "README.md":
            runs = directory / "runs"
            shutil.copytree(runs / "mine", runs / "other")
            assert "step 2" in said["mcore-rl train run.toml"]
            assert (runs / "mine" / "report.html").is_file()
        if name == "tutorial.md":
            assert "right" in (directory / "runs" / "mine" / "metrics.jsonl").read_text()
            assert "  reward  " in said["mcore-rl eval runs/mine"], "of parts, and no accuracy"
        if name == "report.md":
            assert (directory / "runs" / "mine" / "comparison.html").is_file()
        if name == "checkpoints.md":
            assert (directory / "runs" / "branch" / "checkpoints").is_dir()
