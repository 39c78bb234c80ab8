"""The example task: right answers, held-out problems that no training file holds, files that load offline."""

import json
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
from transformers import AutoConfig, AutoTokenizer

from examples.arithmetic import Problem, main, shuffled, split
from mcore_rl.data.prompts import open_prompts


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arithmetic")
    with redirect_stdout(StringIO()) as said:
        assert main([str(folder)]) == 0
    assert "6000 training and 1000 held-out problems" in said.getvalue()
    return folder


@pytest.mark.slow
def test_the_files_load_and_every_answer_is_right(task):
    tokenizer = AutoTokenizer.from_pretrained(task / "model", local_files_only=True)
    train = open_prompts([task / "train.jsonl"], tokenizer, max_prompt_tokens=8)
    held_out = open_prompts([task / "eval.jsonl"], tokenizer, max_prompt_tokens=8)
    assert (len(train.prompts), len(held_out.prompts)) == (6000, 1000)
    for prompt in (*train.prompts, *held_out.prompts):
        assert int(prompt.label) == eval(prompt.id)
        assert prompt.text == f"{prompt.id}="
    assert not {p.id for p in train.prompts} & {p.id for p in held_out.prompts}
    labels = tokenizer([p.label for p in held_out.prompts], add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(labels) == [p.label for p in held_out.prompts]


def test_the_model_fits_the_tokenizer(task):
    tokenizer = AutoTokenizer.from_pretrained(task / "model", local_files_only=True)
    config = AutoConfig.from_pretrained(task / "model", local_files_only=True)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("qwen3", 3, 192)
    assert (config.vocab_size, config.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    assert not config.tie_word_embeddings


def test_the_seed_changes_the_order_and_never_the_side():
    one, two = (split(shuffled("+-", 2, seed), 5000, 500) for seed in (0, 1))
    assert one != two
    assert one == split(shuffled("+-", 2, 0), 5000, 500)
    assert not set(one[0]) & set(two[1])


def test_mirrored_sums_are_on_the_same_side_and_both_sides_have_their_share():
    problems = list(shuffled("+*", 2, 0))
    assert all(p.held_out == Problem(p.right, p.operation, p.left).held_out for p in problems)
    assert 0.18 < sum(p.held_out for p in problems) / len(problems) < 0.22


def test_harder_tasks(tmp_path):
    flags = "--digits 5 --operations * --train 50 --eval 20 --tied"
    assert main([str(tmp_path), *flags.split()]) == 0
    first = json.loads((tmp_path / "eval.jsonl").read_text().splitlines()[0])
    left, right = first["id"].split("*")
    assert int(first["label"]) == int(left) * int(right)
    assert AutoConfig.from_pretrained(tmp_path / "model").tie_word_embeddings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--digits", "1"], "only"),
        (["--operations", "/"], "use each of"),
        (["--hidden", "100"], "multiple of 64"),
        (["--train", "0"], "at least 1"),
    ],
)
def test_a_task_that_cannot_be_made_writes_nothing(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as left:
        sys.exit(main([str(tmp_path), *arguments]))
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
