"""Precisions: Megatron's fields and layers for every recipe and family, and the alignment of tokens."""

from __future__ import annotations

from math import lcm
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_rl.data.packing import TokenSequence, pack
from mcore_rl.errors import ConfigError
from mcore_rl.model import precision as here
from mcore_rl.model.hf.architecture import Architecture, read_architecture
from mcore_rl.model.hf.parameters import ParameterMap, canonical
from mcore_rl.model.layouts import DTYPES, padded_vocab
from mcore_rl.model.portable import PORTABLE, PackedAttention, RMSNorm
from mcore_rl.model.precision import check_fp8, takes_transformer_engine
from mcore_rl.model.spec import layer_spec, parts_of, transformer_config
from mcore_rl.parallel.context import local_tokens
from mcore_rl.parallel.layout import Layout
from mcore_rl.precision import ITEM_BYTES, RECIPES, Fp8, RecipeName, packed_multiple, token_multiple
from tests.model.families import FAMILIES

ENGINE = here.engine_is_importable()
NO_ENGINE = "Transformer Engine is not installed (tools/gpu_machine.sh)"
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated")  # Megatron about its own default


def architecture(family: str, directory: Path) -> Architecture:
    kind, arguments = FAMILIES[family]
    getattr(transformers, kind)(**arguments).save_pretrained(directory)
    return read_architecture(directory)


def config_of(family: str, directory: Path, fp8: Fp8) -> TransformerConfig:
    arch = architecture(family, directory)
    if arch.experts is not None and not ENGINE:
        with pytest.raises(ConfigError, match="needs Transformer Engine"):
            transformer_config(arch, Layout(), "fp8", fp8=fp8)
        pytest.skip(f"experts in FP8: {NO_ENGINE}")
    return transformer_config(arch, Layout(), "fp8", fp8=fp8)


# --- fields -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_recipe_reaches_megatron_and_nothing_else_is_in_fp8(family: str, recipe: Any, tmp_path) -> None:
    config = config_of(family, tmp_path, Fp8(recipe, param_gather=True))
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", recipe, True)
    assert (config.bf16, config.params_dtype, config.pipeline_dtype) == (True, *[torch.bfloat16] * 2)
    assert not config.fp8_dot_product_attention
    assert not config.fp8_multi_head_attention
    assert config.first_last_layers_bf16 is False
    assert getattr(config, "fp8_output_proj", False) is False  # the lm_head, where the version asks
    if config.num_moe_experts:
        assert config.moe_router_dtype == "fp32"
    bf16 = transformer_config(read_architecture(tmp_path), Layout(), "bf16")
    assert (bf16.fp8, bf16.fp8_param, bf16.bf16) == (None, False, True)


def test_the_first_and_last_layer_stay_in_bf16_where_the_recipe_has_no_memory(tmp_path) -> None:
    for recipe in get_args(RecipeName):
        if RECIPES[recipe].remembers:
            with pytest.raises(ValueError, match="Delayed scaling does not support first / last layer"):
                config_of("qwen3", tmp_path, Fp8(recipe, first_last_bf16=True))
        else:
            config = config_of("qwen3", tmp_path, Fp8(recipe, first_last_bf16=True))
            assert config.first_last_layers_bf16
            assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 1)


def test_every_table_knows_the_same_names() -> None:
    assert set(get_args(RecipeName)) == set(RECIPES)
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEM_BYTES


# --- layers -------------------------------------------------------------------------------------------------


def inside(spec: Any) -> Any:
    """The submodules of a ModuleSpec, or of a partial: it depends on the version."""
    return spec.submodules if hasattr(spec, "submodules") else spec.keywords["submodules"]


def _plain(part: Any) -> Any:
    """The class of a part, with or without arguments of its own."""
    return getattr(part, "module", getattr(part, "func", part))


def modules(spec: Any) -> dict[str, Any]:
    """The modules of one layer, by part."""
    s = spec.submodules
    mlp = inside(s.mlp)
    linears = inside(mlp.experts) if hasattr(mlp, "experts") else mlp
    attention = s.self_attention.submodules
    latent = hasattr(attention, "linear_kv_up_proj")
    # Latent attention builds its projections itself.
    projection = linears.linear_fc1 if latent else attention.linear_qkv
    return {
        "norms": (s.input_layernorm, s.pre_mlp_layernorm, None if latent else attention.q_layernorm),
        "attention": _plain(attention.core_attention),
        "column": (_plain(projection), linears.linear_fc1),
        "row": (_plain(attention.linear_proj), linears.linear_fc2),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_gpu_layers_are_portable_and_fp8_is_refused(family: str, tmp_path, monkeypatch) -> None:
    arch = architecture(family, tmp_path)
    for precision in ("fp32", "bf16"):
        config = transformer_config(arch, Layout(), precision)
        spec = layer_spec(config, arch, parts_of(config), 0)
        found = modules(spec)
        assert found["attention"] is PackedAttention
        assert all(issubclass(linear, ColumnParallelLinear) for linear in found["column"])
        assert all(issubclass(linear, RowParallelLinear) for linear in found["row"])
        assert found["norms"][:2] == ((RMSNorm if arch.input_norms else IdentityOp),) * 2
        assert (found["norms"][2] is RMSNorm) is arch.qk_norm
    config.fp8, config.fp8_recipe = "hybrid", "blockwise"
    with pytest.raises(
        ConfigError, match=r'needs a GPU, and this machine has none; set model.precision = "bf16"'
    ):
        parts_of(config)


def test_fp8_is_refused_with_the_remedy_that_fits_the_gpu(monkeypatch) -> None:
    """What a machine with a GPU answers; only the answers of torch are replaced."""

    def on(capability: tuple[int, int], engine: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(here, "engine_is_importable", lambda: engine)

    on((8, 0), True)
    with pytest.raises(
        ConfigError, match=r'needs Hopper or newer.*capability 8.0; set model.precision = "bf16"'
    ):
        check_fp8("blockwise")
    on((8, 9), True)
    with pytest.raises(ConfigError, match='set it to "tensorwise"'):
        check_fp8("blockwise")
    check_fp8("delayed")
    on((9, 0), True)
    check_fp8("blockwise")
    with pytest.raises(ConfigError, match="needs Blackwell or newer"):
        check_fp8("mxfp8")
    assert takes_transformer_engine(torch.bfloat16)
    assert not takes_transformer_engine(torch.float32)
    on((10, 0), False)
    with pytest.raises(ConfigError, match=r"tools/gpu_machine.sh installs it"):
        check_fp8("mxfp8")
    assert not takes_transformer_engine(torch.bfloat16)


# --- names --------------------------------------------------------------------------------------------------


def engine_name(name: str, *, sparse: bool) -> str:
    """A portable parameter's name as Transformer Engine has it: two norms move into linear layers."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name if sparse else name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_transformer_engine_round_trip(family: str, tmp_path) -> None:
    arch = architecture(family, tmp_path)
    mapping = ParameterMap(arch, padded_vocab(arch, 1))
    fused = 0
    for entry in mapping.entries():
        sparse = entry.layer is not None and arch.is_sparse(entry.layer)
        name = engine_name(entry.megatron, sparse=sparse)
        fused += name != entry.megatron
        assert mapping.entry(canonical(name)).hf == entry.hf
        if name != entry.megatron:
            with pytest.raises(ConfigError, match="has no rule"):
                mapping.entry(name)  # as it comes, it is unknown
    dense = sum(not arch.is_sparse(layer) for layer in range(arch.layers))
    assert fused == (arch.layers + dense if arch.input_norms else 0)


# --- tokens -------------------------------------------------------------------------------------------------

DEGREE = st.sampled_from([1, 2, 4, 8])


@given(
    DEGREE, DEGREE, st.sampled_from(sorted(RECIPES)), st.booleans(), st.lists(st.integers(1, 70), max_size=4)
)
def test_packed_lengths_suit_the_layout_and_the_recipe(
    tensor: int, context: int, recipe: str, sequence: bool, lengths: list[int]
) -> None:
    sequence &= tensor > 1
    tokens = token_multiple("fp8", recipe)
    align = packed_multiple(tensor, context, tokens, sequence=sequence)
    shards = tensor if sequence else 1
    assert align % lcm(2 * context * shards if context > 1 else shards, tokens) == 0
    assert (align // context) % lcm(tokens, shards) == 0
    packed = pack(
        [TokenSequence((1,) * length, ()) for length in lengths], list(range(len(lengths))), {}, align=align
    )
    assert not (packed.cu_seqlens.diff() % align).any()
    assert not (packed.cu_seqlens.diff() < torch.tensor(lengths or [0])).any()
    for rank in range(context):
        mine = local_tokens(packed.cu_seqlens, context, rank) if context > 1 else packed.tokens
        assert mine.numel() % tokens == 0
        assert mine.numel() % shards == 0


def test_the_common_multiple_alone_would_leave_a_rank_with_half_a_block() -> None:
    assert lcm(2 * 2, token_multiple("fp8", "mxfp8")) // 2 % 32 != 0
    assert packed_multiple(1, 2, token_multiple("fp8", "mxfp8"), sequence=False) // 2 % 32 == 0
    assert token_multiple("bf16", "mxfp8") == 1


# --- with Transformer Engine, on CPU ------------------------------------------------------------------------


@pytest.mark.skipif(not ENGINE, reason=NO_ENGINE)
@pytest.mark.parametrize("sparse", [False, True])
def test_its_layers_are_megatrons_own_but_for_the_attention(sparse: bool, tmp_path) -> None:
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from mcore_rl.model.engine import PARTS

    family = "qwen3_moe" if sparse else "qwen3"
    config, arch = config_of(family, tmp_path, Fp8()), architecture(family, tmp_path)
    ours = modules(layer_spec(config, arch, PARTS, 0))
    theirs = modules(
        get_gpt_layer_with_transformer_engine_spec(num_experts=4 if sparse else None, qk_layernorm=True)
    )
    assert issubclass(ours.pop("attention"), theirs.pop("attention"))
    assert not getattr(config, "fused_residual_rmsnorm", False)  # by 0.19.2
    theirs["norms"] = tuple(TENorm if "WithResidual" in norm.__name__ else norm for norm in theirs["norms"])
    assert ours == theirs
    portable = modules(layer_spec(config, arch, PORTABLE, 0))
    assert portable["column"] != theirs["column"]  # it can fail
