"""The commands of the pages: which are run, which another test covers, which need what is not here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.sources import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "sh")
NEEDS = re.compile(r"#.*\bneeds (GPUs|the servers|SGLang|Docker|the network|a terminal)\b")
"""how the comment of a command says that it cannot be run where the tests are"""
PREPARES = ("source", "export", "mkdir")
"""words of the shell itself"""
OF_THE_TESTS = re.compile(r"make (lint|test(-\w+)?)$")
"""targets that run the tests themselves; test_ci.py runs what calls them"""
OWN_LOSS = "tests/verify/test_own_loss.py::test_one_command_proves_it_at_several_layouts"
PLAN = "tests/test_front_door.py::test_a_plan_does_not_wait_for_megatron"
REHEARSE = "tests/plan/test_recipes.py::test_a_rehearsal_trains_resumes_and_exports"
CHAT = "tests/talk/test_talk.py::test_a_pipe_gets_an_answer_for_every_line"
EVAL = "tests/e2e/test_eval_command.py"
CALCULATOR, CONNECTORS = "benchmarks/calculator.py::main", "benchmarks/connectors.py::main"
GYM = "tests/environments/test_reasoning_gym.py::test_a_prompt_file_is_written_and_what_is_wrong_is_named"
VERIFIERS = "tests/environments/test_verifiers.py"
OPENENV = "tests/environments/test_openenv.py"
COVERED = {
    "README.md": {
        "make demo": "tests/e2e/test_demo.py::test_run_directory_is_complete",
        "mcore-rl chat runs/mine": CHAT,
        "mcore-rl verify layouts --loss": OWN_LOSS,
        "mcore-rl plan examples/gspo_70b.toml": PLAN,
        "bash examples/train_gspo_70b.sh --rehearse": REHEARSE,
    },
    "algorithms.md": {
        "mcore-rl verify golden": (
            "tests/algo/test_golden.py::test_the_command_starts_its_ranks_and_ends_with_json"
        ),
        "mcore-rl verify layouts --loss": OWN_LOSS,
    },
    "cluster.md": {
        ".venv/bin/mcore-rl plan": PLAN,
        "bash examples/train_gspo_70b.sh --rehearse": REHEARSE,
    },
    "commands.md": {
        "mcore-rl chat": CHAT,
        "printf": CHAT,
        "mcore-rl serve": "tests/talk/test_talk.py::test_it_says_where_it_is",
        "curl": "tests/talk/test_talk.py::test_sampling_parameters_act_and_what_would_not_is_refused",
    },
    "environments.md": {
        "python examples/calculator.py": CALCULATOR,
        "mcore-rl train examples/calculator": CALCULATOR,
    },
    "evaluation.md": {
        "mcore-rl eval RUN_DIR": f"{EVAL}::test_a_run_s_weights_and_its_checkpoint_answer_alike",
        "mcore-rl eval CONFIG.toml": (
            f"{EVAL}::test_a_config_is_evaluated_by_a_server_of_its_own_which_ends_with_the_command"
        ),
    },
    "faults.md": {
        "mcore-rl train run.toml --replay": (
            "tests/launch/test_replay.py::test_the_command_says_where_and_ends_with_70"
        ),
    },
    "lora.md": {
        "mcore-rl convert": (
            "tests/e2e/test_lora.py::test_a_run_publishes_merged_weights_and_continues_from_its_adapters"
        ),
    },
    "models.md": {
        "mcore-rl convert": (
            "tests/convert/test_convert.py::test_the_certificate_is_in_the_manifest_and_can_be_refused"
        ),
        "python tools/verify_checkpoint.py": "tests/convert/test_tools.py::test_there_and_back",
        "python tools/compare_runs.py": (
            "tests/convert/test_tools.py::test_runs_are_compared_without_their_times"
        ),
    },
    "openenv.md": {
        ".venv-openenv/bin/python": (
            f"{OPENENV}::test_episodes_on_the_packages_server_are_rollouts_with_its_own_rewards"
        ),
    },
    "reasoning_gym.md": {
        "python -m mcore_rl.environments.connectors.reasoning_gym": GYM,
        "python examples/calculator.py": CONNECTORS,
        "mcore-rl train": CONNECTORS,
    },
    "report.md": {
        "mcore-rl report --follow": (
            "tests/report/test_follow.py::test_the_command_prints_its_address_and_ends_when_asked"
        ),
    },
    "rollout.md": {
        "mcore-rl follow": "tests/weights/test_follow.py::test_the_command_follows_until_it_is_asked_to_end",
    },
    "trackers.md": {
        "mcore-rl train run.toml --watch.profile_steps": (
            "tests/e2e/test_watch.py::test_a_watched_run_says_when_every_rank_and_server_did_what"
        ),
    },
    "tutorial.md": {"mcore-rl verify layouts --loss": OWN_LOSS},
    "verifiers.md": {
        beginning: f"{VERIFIERS}::test_episodes_of_the_package_are_rollouts_with_its_own_rewards"
        for beginning in ("python -m mcore_rl.environments.connectors.verifiers", "mcore-rl train run.toml")
    },
}
"""page -> beginning of a command -> what runs its like: a test, or a benchmark where it takes minutes"""
RUN = ("README.md", "tutorial.md", "checkpoints.md", "report.md")
"""pages of which every other command is run, in this order"""


@dataclass(frozen=True)
class DocCommand:
    """A line of a shell block, without its comment."""

    page: str
    text: str
    comment: str

    @property
    def covered(self) -> str | None:
        """What runs its like."""
        table = COVERED.get(self.page, {})
        return next((test for beginning, test in table.items() if self.text.startswith(beginning)), None)

    @property
    def is_run(self) -> bool:
        """Whether it is run here: nobody else answers for it."""
        prepares = self.text.split()[0] in PREPARES or OF_THE_TESTS.match(self.text)
        return not (prepares or NEEDS.search(self.comment) or self.covered)


def commands_of(page: str, text: str) -> Iterator[DocCommand]:
    """Every command in the shell blocks of a page, in order; one may go on over several lines."""
    for language, body in FENCE.findall(text):
        lines = body.replace("\\\n", " ").splitlines()
        if language not in SHELL and not any(line.startswith("mcore-rl ") for line in lines):
            continue
        for line in lines:
            command, comment = without_comment(line)
            if command:
                yield DocCommand(page, command, comment)


def without_comment(line: str) -> tuple[str, str]:
    """A line's command, spaces as one, and its comment; a # within quotes begins none."""
    quote = ""
    for place, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (place == 0 or line[place - 1].isspace()):
            return " ".join(line[:place].split()), line[place:]
    return " ".join(line.split()), ""


def all_commands() -> list[DocCommand]:
    """Every command of every page."""
    return [found for page in PAGES for found in commands_of(page.name, page.read_text())]


def files_of(page: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the files that a page shows: their first line is `# name.py` or `# name.toml`."""
    for _, body in FENCE.findall(page.read_text()):
        if named := re.match(r"# (\w+\.(?:py|toml))\b", body):
            yield named[1], body
