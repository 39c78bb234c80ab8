"""Whether a model directory is the same: all that a model is built from is compared, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_rl.checkpoint.manifest import Saved
from mcore_rl.errors import ConfigError
from mcore_rl.model.hf import content
from mcore_rl.model.hf.content import file_content, model_content
from mcore_rl.training.inputs import changed_sets, check_inputs, knows_inputs
from tests.rollout.support import build_model, save_model


def fields(directory: Path, name: str = "config.json", **changed: object) -> None:
    path = directory / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(dict(reversed(list((known | changed).items())))))


def one_weight(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][-1] += 1e-6
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def other_dtype(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, directory / "model.safetensors")


def two_files(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    norm = {name: tensors.pop(name) for name in list(tensors) if "norm" in name}
    save_file(norm, directory / "b.safetensors")
    save_file(tensors, directory / "a.safetensors")


CHANGES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "nothing": (lambda d: None, set()),
    "order of fields": (fields, set()),
    "writer": (lambda d: fields(d, transformers_version="9", torch_dtype="float16"), set()),
    "files": (two_files, set()),
    "rope_theta": (lambda d: fields(d, rope_parameters={"rope_theta": 5.0}), {"config.json"}),
    "stop": (lambda d: fields(d, "generation_config.json", eos_token_id=[4]), {"generation_config.json"}),
    "a weight": (one_weight, {"weights"}),
    "a type": (other_dtype, {"weights"}),
}


@pytest.mark.parametrize("whole", [1 << 28, 0], ids=["whole", "pieces"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_model_is_built_from_is_compared(tmp_path: Path, monkeypatch, change: str, whole: int) -> None:
    monkeypatch.setattr(content, "WHOLE_BYTES", whole)
    one = save_model(tmp_path / "one", build_model(0))
    fields(one, "generation_config.json", eos_token_id=[2])
    shutil.copytree(one, tmp_path / "other")
    make, parts = CHANGES[change]
    make(tmp_path / "other")
    then, now = (model_content(tmp_path / name, weights=True) for name in ("one", "other"))
    assert {name for name in then if then[name] != now[name]} == parts
    saved = Saved(tmp_path / "step_2", 2, {}, {"inputs": {"model.path": then}})
    if parts:
        with pytest.raises(ConfigError, match=f"model.path: {next(iter(parts))} changed since .*step_2"):
            check_inputs(saved, {"model.path": now})
    else:
        check_inputs(saved, {"model.path": now})


def test_pieces_see_the_ends_and_the_middle_of_a_large_tensor(tmp_path: Path, monkeypatch) -> None:
    """And not every byte, which is what makes a large model cheap."""
    monkeypatch.setattr(content, "WHOLE_BYTES", 0)
    found = []
    for place in (None, 0, 50_000, 99_999, 25_000):
        tensor = torch.zeros(100_000)
        if place is not None:
            tensor[place] = 1
        save_file({"w": tensor}, tmp_path / "model.safetensors")
        found.append(content._weights_digest(tmp_path))
    assert len(set(found)) == 4
    assert found[4] == found[0]


def test_a_held_out_set_is_said_and_an_earlier_version_knows_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    now = {"data.eval": {"content": file_content(tmp_path / "a")}, "eval.sets.b.path": {"content": "x"}}
    (tmp_path / "a").write_text("2")
    saved = Saved(tmp_path, 1, {}, {"inputs": {"data.eval": {"content": file_content(tmp_path / "a")}}})
    assert changed_sets(saved, now) == ["data.eval"]
    for of_earlier in ({}, {"inputs": "?"}):
        old = Saved(tmp_path, 1, {}, of_earlier)
        assert not knows_inputs(old)
        assert changed_sets(old, now) == []
        check_inputs(old, {"model.path": {"weights": "1"}})
