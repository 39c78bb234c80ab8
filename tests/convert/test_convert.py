"""Conversion both ways: bitwise, loadable by Megatron itself, whole or not there."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from safetensors.torch import load_file, save_file

from mcore_rl.checkpoint import manifest
from mcore_rl.checkpoint.manifest import COMMITTED, MANIFEST
from mcore_rl.convert import output
from mcore_rl.convert.certify import certify
from mcore_rl.convert.command import adapter, hf_to_mcore, mcore_to_hf, merge
from mcore_rl.convert.output import ConversionProgress
from mcore_rl.convert.verify import verify_checkpoint
from mcore_rl.errors import CheckpointError, ConfigError, NumericsError
from mcore_rl.model.build import build_policy
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.hf.torch_dist import place, torch_dist_reader
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool, RankError, spawn
from tests.model.support import at_layout


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_there_and_back_is_bitwise(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    original = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    shutil.copytree(source, tmp_path / "hf")
    save_file(original, tmp_path / "hf" / "model.safetensors")
    hf_to_mcore(tmp_path / "hf", tmp_path / "mcore", tensor=2, pipeline=2)
    mcore_to_hf(tmp_path / "mcore", tmp_path / "back", shard_gb=3e-5)
    back = weights(tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name


def test_transformers_loads_what_was_written(source: Path, converted: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    mcore_to_hf(converted, tmp_path / "back", shard_gb=3e-5)
    models = [AutoModelForCausalLM.from_pretrained(d) for d in (source, tmp_path / "back")]
    one, other = (model(torch.arange(12)[None]).logits for model in models)
    assert torch.equal(one, other)


def megatron_loads(mesh: Mesh, source: Path, converted: Path) -> list[str]:
    """What Megatron's own loader misses, or fills otherwise than this project does; [] is good."""
    model = build_policy(source, mesh)
    expected = {name: p.detach().clone() for name, p in global_parameters(model.unwrapped).items()}
    for chunk in model.unwrapped:
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
        state = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        loaded, missing, _ = dist_checkpointing.load(state, str(converted), strict=StrictHandling.RETURN_ALL)
        chunk.load_state_dict(loaded, strict=False)
    found = global_parameters(model.unwrapped)
    wrong = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    # Megatron keeps a place for Transformer Engine's state, which is empty without FP8.
    return wrong + [str(key) for key in missing if "_extra_state" not in str(key)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", ["tp2+sp", "pp2", "ep2"])
def test_megatron_loads_it_at_any_layout(pool2: Pool, source: Path, converted: Path, layout: str) -> None:
    if layout == "ep2" and read_architecture(source).experts is None:
        pytest.skip("a dense family has no experts to spread")
    assert at_layout(pool2, layout, megatron_loads, source, converted) == [[], []]


def policy_from(mesh: Mesh, directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: p.detach() for name, p in global_parameters(build_policy(directory, mesh).unwrapped).items()
    }


def test_a_converted_directory_is_a_model_path(pool2: Pool, source: Path, converted: Path) -> None:
    layout = "tp2+sp"
    for one, other in zip(
        *(at_layout(pool2, layout, policy_from, d) for d in (source, converted)), strict=True
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


# --- strict ------------------------------------------------------------------------------------------------


def changed_config(directory: Path, target: Path, **change) -> Path:
    shutil.copytree(directory, target)
    config = json.loads((directory / "config.json").read_text()) | change
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_every_parameter_that_does_not_fit_is_listed(dense_source: Path, tmp_path: Path) -> None:
    hf_to_mcore(dense_source, tmp_path / "mcore")
    layers = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    bad = changed_config(tmp_path / "mcore", tmp_path / "bad", **layers, intermediate_size=32)
    with pytest.raises(ConfigError) as raised:
        mcore_to_hf(bad, tmp_path / "hf")
    for part in (
        "missing decoder.layers.2.mlp.linear_fc2.weight",
        "decoder.layers.0.mlp.linear_fc1.weight has shape (128, 32), config.json asks for (64, 32)",
    ):
        assert part in str(raised.value)
    tied = changed_config(tmp_path / "mcore", tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=r"unexpected output_layer\.weight"):
        mcore_to_hf(tied, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_existing_target_is_left_alone(dense_source: Path, tmp_path: Path) -> None:
    (tmp_path / "mcore").mkdir()
    with pytest.raises(ConfigError, match="exists; remove it"):
        hf_to_mcore(dense_source, tmp_path / "mcore")
    assert not any((tmp_path / "mcore").iterdir())


@pytest.mark.parametrize("target", ["nope/..", "nope/.", "nope/../..", ".", "", "nope/deep/new"])
def test_no_directory_is_left_where_nothing_was_converted(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError):
        hf_to_mcore(Path("no model"), Path(target))
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_dots_in_a_target_need_no_directory(dense_source: Path, tmp_path: Path) -> None:
    hf_to_mcore(dense_source, tmp_path / "nope/../new/deep")
    assert (tmp_path / "new/deep" / COMMITTED).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_lies_where_the_target_is_written_is_left_alone(dense_source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mcore.partial" / "mine"
    mine.parent.mkdir()
    mine.write_text("precious")
    with pytest.raises(ConfigError, match=r"mcore.partial holds files and no mark of mcore_rl"):
        hf_to_mcore(dense_source, tmp_path / "mcore")
    assert mine.read_text() == "precious"


def test_a_file_with_the_name_of_a_lock_is_left_alone(dense_source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mcore.lock"
    mine.write_text("precious")
    hf_to_mcore(dense_source, tmp_path / "mcore")
    assert mine.read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"mcore.lock", "mcore"}


def test_two_conversions_to_one_target_are_told_apart(dense_source: Path, tmp_path: Path) -> None:
    with output.whole_directory(tmp_path / "mcore") as first:
        (first / "begun").touch()
        with pytest.raises(CheckpointError, match=rf"mcore.partial is in use by process {os.getpid()} on "):
            hf_to_mcore(dense_source, tmp_path / "mcore")
        assert (first / "begun").exists()
    assert [path.name for path in (tmp_path / "mcore").iterdir()] == ["begun"]


class Malice:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def test_a_pickle_in_the_metadata_runs_nothing(converted: Path, tmp_path: Path) -> None:
    bad, witness = shutil.copytree(converted, tmp_path / "bad"), tmp_path / "ran"
    (bad / ".metadata").write_bytes(pickle.dumps(Malice(witness)))
    with pytest.raises(CheckpointError, match=r"refused: it names posix\.mkdir; nothing of it was run"):
        mcore_to_hf(bad, tmp_path / "hf")
    assert not witness.exists()
    pickle.loads((bad / ".metadata").read_bytes())  # noqa: S301  # the control: the pickle does run
    assert witness.exists()


def test_metadata_cannot_point_out_of_its_directory(converted: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(converted, tmp_path / "bad")
    with (bad / ".metadata").open("rb") as file:
        metadata = pickle.load(file)  # noqa: S301  # written by this test's session
    next(iter(metadata.storage_data.values())).relative_path = "../mcore/__0_0.distcp"
    (bad / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="not a file of its own"):
        mcore_to_hf(bad, tmp_path / "hf")


# --- damage and interruption -------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": (lambda d: flip(d / "__0_0.distcp"), r"__0_0\.distcp does not have the checksum"),
    "cut": (
        lambda d: os.truncate(d / "__1_0.distcp", 99),
        r"__1_0\.distcp has 99 bytes",
    ),
    "deleted": (lambda d: (d / "__2_0.distcp").unlink(), r"__2_0\.distcp is missing"),
    "manifest": (lambda d: flip(d / MANIFEST), "not the one that COMMITTED stands for"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(converted: Path, tmp_path: Path, damage: str) -> None:
    bad = shutil.copytree(converted, tmp_path / "bad")
    manifest.read(bad).check()
    change, message = DAMAGE[damage]
    change(bad)
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(bad)


def test_verify_compares_bits(source: Path, converted: Path, tmp_path: Path) -> None:
    assert verify_checkpoint(converted, against=source)["tensors"] == len(weights(source))
    other = weights(source)
    other["model.norm.weight"][3] += 1e-6
    shutil.copytree(source, tmp_path / "other")
    save_file(other, tmp_path / "other" / "model.safetensors")
    with pytest.raises(NumericsError, match=r"differs from .* in \['model\.norm\.weight'\]"):
        verify_checkpoint(converted, against=tmp_path / "other")


def test_a_full_disk_leaves_nothing(
    source: Path, converted: Path, dense_source: Path, adapted: Path, tmp_path: Path
) -> None:
    """A limit on the size of files: the kernel refuses the bytes beyond it, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    joined, alone = (partial(convert, model=dense_source) for convert in (merge, adapter))
    for convert, start in (
        (hf_to_mcore, source),
        (mcore_to_hf, converted),
        (joined, adapted),
        (alone, adapted),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(CheckpointError, match="nothing is left of the conversion"):
                convert(start, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not any(path.is_dir() for path in tmp_path.iterdir())


def killed_at(parameter: int, convert: Callable[[Path, Path], object], source: Path, target: Path) -> None:
    def add(self: ConversionProgress, size: int) -> None:
        self.parameters += 1
        if self.parameters == parameter:
            os.kill(os.getpid(), signal.SIGKILL)

    output.ConversionProgress.add = add
    convert(source, target)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf-to-mcore", "merge"])
def test_a_killed_conversion_starts_clean(
    dense_source: Path, adapted: Path, tmp_path: Path, kind: str
) -> None:
    convert, start, files = {
        "hf-to-mcore": (hf_to_mcore, dense_source, "*.distcp"),
        "merge": (partial(merge, model=dense_source, shard_gb=3e-5), adapted, "*.safetensors"),
    }[kind]
    with pytest.raises(RankError):
        spawn(killed_at, 1, 9, convert, start, tmp_path / "new")
    assert list((tmp_path / "new.partial").rglob(files)), "the process died while writing"
    assert not (tmp_path / "new").exists()
    convert(start, tmp_path / "new")
    assert verify_checkpoint(tmp_path / "new", **({} if kind == "merge" else {"against": dense_source}))
    assert not (tmp_path / "new.partial").exists()
    assert (tmp_path / "new" / COMMITTED).exists()


# --- the certificate ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_certificate_is_in_the_manifest_and_can_be_refused(dense_source: Path, tmp_path: Path) -> None:
    hf_to_mcore(dense_source, tmp_path / "mcore", certified=True)
    certificate = json.loads((tmp_path / "mcore" / MANIFEST).read_text())["conversion"]["certificate"]
    assert certificate["max_abs_logit_difference"] < 1e-5 < certificate["max_abs_logit"]
    shutil.copytree(dense_source, tmp_path / "other")
    tensors = load_file(dense_source / "model.safetensors")
    gate, up = (f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    with pytest.raises(NumericsError, match="not the same model"):
        certify(tmp_path / "other", tmp_path / "mcore")


def test_a_directory_stored_in_other_boxes_is_read(dense_source: Path, tmp_path: Path) -> None:
    """What tensor-parallel ranks write: every parameter in halves along its last axis."""
    from torch.distributed.checkpoint import FileSystemWriter, SavePlan
    from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    arch = read_architecture(dense_source)
    mapping = ParameterMap(arch, arch.vocab)
    original = load_file(dense_source / "model.safetensors")
    halves: dict[MetadataIndex, torch.Tensor] = {}
    plans = []
    for rank in range(2):
        items = []
        for entry in mapping.entries():
            where = place(entry, mapping)
            half = mapping.to_shard(entry, [original[name] for name in entry.hf], 0, 1).chunk(2, -1)[rank]
            offset = torch.Size((*where.offset[:-1], rank * half.shape[-1]))
            index = MetadataIndex(where.key, offset)
            data = TensorWriteData(
                ChunkStorageMetadata(offset, half.shape),
                TensorProperties(half.dtype),
                torch.Size(where.shape),
            )
            halves[index] = half.clone()
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        plans.append(SavePlan(items))

    class Planner:
        def resolve_data(self, item: WriteItem) -> torch.Tensor:
            return halves[item.index]

    writer = FileSystemWriter(tmp_path / "halves")
    (tmp_path / "halves").mkdir()
    plans, metadata = create_default_global_save_plan(plans)
    plans = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(plan, Planner()).wait() for plan in plans])
    read = torch_dist_reader(tmp_path / "halves", mapping)
    assert all(torch.equal(read(name), tensor) for name, tensor in original.items())


def as_link(tmp_path: Path) -> Path:
    (tmp_path / "mcore").symlink_to(tmp_path / "nowhere")
    return tmp_path / "mcore"


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file" / "mcore"


@pytest.mark.parametrize(
    "target", [as_link, below_a_file, lambda path: path / ("x" * 300), lambda path: path / ("x" * 250)]
)
def test_a_target_that_no_directory_can_be_is_refused_before_anything_is_converted(
    tmp_path: Path, target: Callable[[Path], Path]
) -> None:
    with (
        pytest.raises(ConfigError, match=r"ame another"),
        output.whole_directory(target(tmp_path)),
    ):
        pytest.fail("it was begun")
    assert not list(tmp_path.glob("**/*.partial"))


@pytest.mark.parametrize("size", [math.nan, math.inf, 1e300, -math.inf, -1.0, 0.0])
def test_a_size_of_files_that_is_none_is_refused(tmp_path: Path, size: float) -> None:
    with pytest.raises(ConfigError, match=r"--shard-gb .*give a number above 0"):
        mcore_to_hf(tmp_path, tmp_path / "hf", shard_gb=size)


def test_a_number_of_files_that_no_model_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 65536 files"):
        hf_to_mcore(tmp_path, tmp_path / "mcore", tensor=10**9)
    assert not list(tmp_path.iterdir())


def test_a_target_where_nothing_can_be_written_is_a_mistake(dense_source: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^/proc/mcore_rl\.partial: .*nothing was converted\. Name another"
    ):
        hf_to_mcore(dense_source, Path("/proc/mcore_rl"))
