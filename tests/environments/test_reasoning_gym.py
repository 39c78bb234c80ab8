"""reasoning-gym itself: rows of its tasks, and rewards that are its own verifiers'."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reasoning_gym

from mcore_rl.environments.connectors.reasoning_gym import main, reward, rows
from mcore_rl.errors import ConfigError, StorageError
from mcore_rl.types import Prompt, Sample

TASKS = {"chain_sum": {"max_terms": 3}, "word_ladder": {}, "countdown": {}, "letter_counting": {}}


def said(row: dict, text: str) -> Sample:
    metadata = json.loads(json.dumps({"reasoning_gym": row["reasoning_gym"]}))
    prompt = Prompt(row["id"], "", (1,), row["label"], metadata, row["prompt"])
    return Sample.of_response(
        id="s",
        prompt=prompt,
        token_ids=np.zeros(1, np.int32),
        log_probs=np.zeros(1, np.float32),
        versions=(),
        text=text,
        finish_reason="stop",
    )


@pytest.mark.parametrize("name", TASKS)
def test_the_reward_is_the_packages_own_for_right_wrong_and_partial_answers(name: str) -> None:
    made = list(rows(name, size=4, seed=7, config=TASKS[name], system="default"))
    data = reasoning_gym.create_dataset(name, size=4, seed=7, **TASKS[name])
    for index, row in enumerate(made):
        entry = data[index]
        assert row["prompt"][-1]["content"] == entry["question"]
        assert "<answer>" in row["prompt"][0]["content"]
        answers = [str(entry["answer"]), "7", "", made[index - 1]["label"], f"{entry['answer']} x"]
        wanted = [float(data.score_answer(answer, entry)) for answer in answers]
        assert [reward(said(row, f"I think <answer>{answer}</answer>.")) for answer in answers] == wanted
        assert reward(said(row, f" {entry['answer']}\n")) == 1.0
        with pytest.raises(ConfigError, match="another entry"):
            reward(said(row | {"label": "other"}, "1"))
        assert wanted[0] == 1.0
        assert min(wanted) < 1.0


def test_a_prompt_file_is_written_and_what_is_wrong_is_named(tmp_path: Path, capsys) -> None:
    out = tmp_path / "train.jsonl"
    assert main(["chain_sum", str(out), "--size", "3", "--config", '{"max_terms": 2}']) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["chain_sum-0-0", "chain_sum-0-1", "chain_sum-0-2"]
    assert lines[0]["reasoning_gym"]["config"] == {"max_terms": 2}
    assert main(["no_such_task", str(out)]) == 2
    assert "no_such_task" in capsys.readouterr().err
    assert main(["chain_sum", str(out), "--config", "[1]"]) == 2
    assert "--config: expected a JSON object" in capsys.readouterr().err
    for place, remedy in (
        (tmp_path, "A directory stands where the file belongs"),
        (tmp_path / "absent" / "train.jsonl", "make it"),
        (out / "train.jsonl", "A file stands where one of its directories belongs"),
    ):
        assert main(["chain_sum", str(place), "--size", "1"]) == StorageError.exit_code
        said_of = capsys.readouterr().err
        assert said_of.startswith(f"error: {place}")
        assert remedy in said_of
    assert [one.name for one in tmp_path.iterdir()] == ["train.jsonl"]
    assert len(out.read_text().splitlines()) == 3
    for config, system in (({"no": 1}, None), ({}, "nobody")):
        with pytest.raises(ConfigError, match="reasoning-gym"):
            list(rows("chain_sum", size=1, seed=0, config=config, system=system))
