"""Windows, caps, sinks and second rotary embeddings: which layers have them, and that each one is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from mcore_rl.algo.distillation import ReverseKL
from mcore_rl.data.packing import TokenSequence, pack
from mcore_rl.model import build, packed_layout, portable
from mcore_rl.model.build import build_policy
from mcore_rl.model.hf.architecture import Architecture, architecture_of
from mcore_rl.model.hf.rope import Linear, Yarn
from mcore_rl.model.hf.stacked import joined
from mcore_rl.model.hf.windows import NO_WINDOWS
from mcore_rl.model.packed_layout import PackedLayout, of_like_lengths
from mcore_rl.model.portable import PackedAttention
from mcore_rl.model.step import forward
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.training.batch import pack_share
from mcore_rl.training.teachers import against
from mcore_rl.types import PackedBatch
from tests.model.conftest import save
from tests.model.families import FAMILIES
from tests.model.support import at_layout, shape_at
from tests.model.test_families import ATOL, Rows, check_gradients, computed, differences, expected_of, logits

# --- what config.json says --------------------------------------------------------------------------------

LAYERS = 12


def windows_of(family: str, **fields: Any) -> tuple[int, ...]:
    """The layers with a window, from 0, as the family's class writes them; ours must be the same."""
    config = getattr(transformers, FAMILIES[family][0])(
        **FAMILIES[family][1] | {"num_hidden_layers": LAYERS, "layer_types": None} | fields
    )
    told = [i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
    hf = config.to_dict()
    for layer_types in (hf["layer_types"], None):  # old files do not tell them
        windows = architecture_of(hf | {"layer_types": layer_types}).windows
        assert [i for i in range(LAYERS) if windows.of(i) is not None] == told
    return tuple(told)


def test_which_layers_have_a_window_is_what_transformers_says() -> None:
    assert windows_of("qwen3", use_sliding_window=True, max_window_layers=9) == (9, 10, 11)
    assert windows_of("qwen3", use_sliding_window=False, max_window_layers=9) == ()
    assert windows_of("qwen2_moe", use_sliding_window=True, max_window_layers=5) == (0, 2, 4)
    assert windows_of("gemma2") == windows_of("gpt_oss") == (0, 2, 4, 6, 8, 10)
    assert windows_of("gemma3") == (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)
    assert windows_of("olmo3") == (0, 1, 2, 4, 5, 6, 8, 9, 10)
    without = {"use_sliding_window": True, "sliding_window": 7, "no_rope_layers": None}
    assert windows_of("smollm3", **without) == (3, 7, 11)


def test_published_files_of_transformers_4_are_read() -> None:
    """Rotary fields outside, one set of them; the numbers are those of the published models."""
    gemma = old_form("gemma3", rope_theta=1e6, rope_local_base_freq=1e4)
    gemma |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 6}
    arch = same_as_transformers("Gemma3TextConfig", gemma)
    assert (arch.rotary.theta, arch.rotary.scaling) == (1e6, Linear(8.0))
    assert arch.local_rotary is not None
    assert (arch.local_rotary.theta, arch.local_rotary.scaling) == (1e4, None)
    olmo = old_form("olmo3", rope_theta=500000)
    olmo |= {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}}
    arch = same_as_transformers("Olmo3Config", olmo)
    assert isinstance(arch.rotary.scaling, Yarn)
    assert arch.local_rotary is not None
    assert arch.local_rotary.scaling is None
    oss = old_form("gpt_oss", rope_theta=150000, experts_per_token=2, initial_context_length=4096)
    oss |= {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        }
    }
    assert same_as_transformers("GptOssConfig", oss) == architecture_of(old_form("gpt_oss"))


def old_form(family: str, **fields: Any) -> dict[str, Any]:
    """The tiny model's fields without rotary ones, and `fields`."""
    kind, settings = FAMILIES[family]
    hf = getattr(transformers, kind)(**settings).to_dict()
    return {name: value for name, value in hf.items() if name != "rope_parameters"} | fields


def same_as_transformers(kind: str, hf: dict[str, Any]) -> Architecture:
    arch = architecture_of(hf)
    assert architecture_of(getattr(transformers, kind).from_dict(dict(hf)).to_dict()) == arch
    return arch


# --- each part is seen ------------------------------------------------------------------------------------


def without_windows(arch: Architecture) -> Architecture:
    """Not without the rotary embeddings that belong to them."""
    return replace(arch, windows=replace(arch.windows, size=1 << 20))


def one_token_more(arch: Architecture) -> Architecture:
    return replace(arch, windows=replace(arch.windows, size=arch.windows.size + 1))


def other_layers(arch: Architecture) -> Architecture:
    return replace(arch, windows=replace(arch.windows, layers=arch.windows.layers[::-1]))


def without_scores_cap(arch: Architecture) -> Architecture:
    return replace(arch, scales=replace(arch.scales, attention_cap=None))


def without_logits_cap(arch: Architecture) -> Architecture:
    return replace(arch, scales=replace(arch.scales, logits_cap=None))


def one_rope(arch: Architecture) -> Architecture:
    return replace(arch, local_rotary=None)


def without_limit(arch: Architecture) -> Architecture:
    return replace(arch, gate_limit=None)


CHANGES: list[tuple[str, Callable[[Architecture], Architecture]]] = [
    ("mistral_window", one_token_more),
    ("qwen3_window", other_layers),
    ("gemma2", without_windows),
    ("gemma2", without_scores_cap),
    ("gemma2", without_logits_cap),
    ("gemma3", one_rope),
    ("gpt_oss", without_limit),
]


def test_a_part_that_is_left_out_is_seen(pool1: Pool, tmp_path: Path) -> None:
    """Negative control of the comparison with transformers: without each of them it fails."""
    for family in dict.fromkeys(name for name, _ in CHANGES):
        kind, settings = FAMILIES[family]
        config = getattr(transformers, kind)(**settings)
        save(transformers.AutoModelForCausalLM.from_config, config, tmp_path / family / "fp32")
        expected = expected_of(tmp_path / family)
        for change in [change for name, change in CHANGES if name == family]:
            answers = at_layout(pool1, "tp1", changed_logits, tmp_path / family, change)
            assert differences(answers, expected) > 100 * ATOL, (family, change.__name__)


def changed_logits(mesh: Mesh, directory: Path, change: Callable[[Architecture], Architecture]) -> Rows:
    plain = build.read_architecture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "read_architecture", lambda path: change(plain(path)))
        return logits(mesh, directory)


# --- attention alone, beside its definition ---------------------------------------------------------------


def defined(q: Tensor, k: Tensor, v: Tensor, window: int | None, cap: float | None, sink: Tensor) -> Tensor:
    """One sequence, head by head and query by query: [L, N, D] of q [L, N, D], k and v [L, K, D]."""
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        group = head // (q.shape[1] // k.shape[1])
        for place in range(len(q)):
            first = 0 if window is None else max(0, place - window + 1)
            scores = k[first : place + 1, group] @ q[place, head] / q.shape[2] ** 0.5
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            weights = torch.cat([scores, sink[head, None]]).softmax(0)[:-1]
            out[place, head] = weights @ v[first : place + 1, group]
    return out


def attention_of(window: int | None, cap: float | None, sinks: bool) -> Any:
    config: Any = SimpleNamespace(
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None,
        num_attention_heads=4,
        tensor_model_parallel_size=1,
        softmax_type="learnable" if sinks else "vanilla",
        params_dtype=torch.float64,
    )
    return PackedAttention(config, 1, None, "self", cap=cap)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rows", [512, 2])
@pytest.mark.parametrize(("window", "cap", "sinks"), [(3, None, False), (None, 0.7, False), (2, 0.7, True)])
def test_attention_is_its_definition(
    monkeypatch, window: int | None, cap: float | None, sinks: bool, rows: int
) -> None:
    """Two packed sequences in float64, and the gradients of queries, keys, values and sinks.

    Once padded to the longer, once each by itself.
    """
    monkeypatch.setattr(portable, "ROWS", rows)
    if rows == 2:
        monkeypatch.setattr(packed_layout, "SHORTER_TOKENS", 0)
    attention = attention_of(window, cap, sinks)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = drawn(12, 4, 6), drawn(12, 2, 6), drawn(12, 2, 6)
    sink = torch.full((4,), -torch.inf, dtype=torch.float64)
    leaves = [q, k, v]
    if sinks:
        sink = drawn(4)
        attention.softmax_offset.data.copy_(sink)
        leaves.append(sink)
    bounds = torch.tensor([0, 7, 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(7), torch.arange(5)])
    layout = PackedLayout.of(positions, bounds, 7, parts=of_like_lengths(bounds, positions))
    got = attention(*(x[:, None] for x in (q, k, v)), packed_seq_params=layout)[:, 0]
    parts = [defined(q[a:b], k[a:b], v[a:b], window, cap, sink) for a, b in ((0, 7), (7, 12))]
    expected = torch.cat(parts).flatten(1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    ours = [q, k, v, *([attention.softmax_offset] if sinks else [])]
    for mine, other in zip(
        torch.autograd.grad((got * weight).sum(), ours),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def layout_of(packed: PackedBatch) -> PackedLayout:
    parts = of_like_lengths(packed.cu_seqlens, packed.position_ids)
    return PackedLayout.of(
        packed.position_ids, packed.cu_seqlens, packed.max_seqlen, begins=packed.begins, parts=parts
    )


def test_sequences_of_like_lengths_are_padded_together() -> None:
    """A long one beside many short ones costs no more than they have tokens, with shared prompts too."""
    sequences = [TokenSequence([1, 2, 3, 4], [5] * n) for n in (60, 2000, 40, *[60] * 29)]
    for share in (True, False):
        one = pack(sequences, range(32), {}, share_prompts=share)
        padding = layout_of(one).padding
        assert padding.queries.shapes == padding.keys.shapes == [(1, 2004), (31, 64)]
        assert padding.from_padded.unique().numel() == len(one.tokens)
        assert torch.equal(padding.queries.index[padding.from_padded], torch.arange(len(one.tokens)))
    halves = pack(sequences, range(32), {}, align=4)
    layout = PackedLayout.of(halves.position_ids[::2], halves.cu_seqlens, halves.max_seqlen, context=2)
    assert layout.padding.queries.shapes == [(32, 1002)]  # keys come from all ranks, with a mask of all
    equal = pack(sequences, [0, 3, 4], {})
    layout = PackedLayout.of(equal.position_ids, equal.cu_seqlens, equal.max_seqlen)
    assert layout.padding.queries.shapes == [(3, 64)]


@pytest.mark.parametrize(
    ("window", "cap", "sinks"), [(None, None, False), (4, None, False), (None, 0.7, False), (3, 0.7, True)]
)
def test_a_shared_prompt_is_attended_to_as_if_each_had_it(
    monkeypatch, window: int | None, cap: float | None, sinks: bool
) -> None:
    """Three samples of one prompt and one of another, packed with each prompt once, and with all of them.

    Answers and gradients in float64; those of the prompt are the sums of its copies'. Those of like lengths
    are padded together: the two longest.
    """
    monkeypatch.setattr(packed_layout, "SHORTER_TOKENS", 0)
    attention = attention_of(window, cap, sinks)
    generator = torch.Generator().manual_seed(1)
    sequences = [TokenSequence([1, 2, 3], [0] * n) for n in (4, 1, 6)]
    sequences.insert(1, TokenSequence([7], [8, 9]))
    once, all_of_them = (
        pack(sequences, range(4), {}, align=4, share_prompts=share) for share in (True, False)
    )
    assert (len(once.tokens), len(all_of_them.tokens)) == (8 + 4 + 4 + 8, 8 + 4 + 4 + 12)
    assert once.begins is not None
    # for each token of `all_of_them` the one of `once`
    offsets = [0, 8, 12, 16]
    copies = [range(8), range(8, 12), [0, 1, 2, 12], [0, 1, 2, *range(16, 22)]]
    which = torch.tensor([token for copy in copies for token in copy])
    whole = all_of_them.cu_seqlens[:-1].tolist()
    live = torch.cat([start + torch.arange(len(copy)) for start, copy in zip(whole, copies, strict=True)])
    assert once.cu_seqlens[:-1].tolist() == offsets
    tokens = len(once.tokens)
    q, k, v = (
        torch.randn(tokens, heads, 6, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    )
    weight = torch.randn(len(live), 24, generator=generator, dtype=torch.float64)

    def passed(packed: PackedBatch, share: bool) -> list[Tensor]:
        layout = layout_of(packed)
        given = [q, k, v]
        if not share:
            index = torch.zeros(len(packed.tokens), dtype=torch.int64).index_copy(0, live, which)
            given = [x[index] for x in given]
        out = attention(*(x[:, None] for x in given), packed_seq_params=layout)[:, 0]
        picked = out[which if share else live]
        leaves = [q, k, v, *attention.parameters()]
        return [picked, *torch.autograd.grad((picked * weight).sum(), leaves)]

    for ours, expected in zip(passed(once, True), passed(all_of_them, False), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    wrong = replace(once, begins=once.begins + torch.tensor([0, 0, 1, 1]))  # negative control
    assert not torch.allclose(passed(wrong, True)[0], passed(once, True)[0], rtol=1e-3)


def test_a_model_without_windows_has_none() -> None:
    assert NO_WINDOWS.of(3) is None


# --- other flags, at products of layouts ------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma2": ("tp2cp2", "gemma2", {"attention_bias": True, "attn_logit_softcapping": None}),
    "gemma3": ("pp2cp2", "gemma3", {"final_logit_softcapping": None, "tie_word_embeddings": False}),
    "gpt_oss": ("tp2+spcp2", "gpt_oss", {"attention_bias": False, "sliding_window": 1}),
    "gpt_oss_ep": ("cp2ep2dp2", "gpt_oss", {"num_key_value_heads": 8, "swiglu_limit": 7.0}),
    "olmo3": ("tp2cp2", "olmo3", {"sliding_window": 40}),
    "olmo2": ("tp2pp2", "olmo2", {"attention_bias": True, "initializer_range": 0.2}),
    "smollm3": (
        "pp2cp2",
        "smollm3",
        # a bias of keys that are not turned has no gradient: a softmax does not see it
        {"use_sliding_window": True, "sliding_window": 6, "mlp_bias": True},
    ),
    "phi3": ("tp2pp2", "phi3", {"sliding_window": 4}),
    "granite": ("tp2+spcp2", "granite", {"attention_bias": True, "mlp_bias": True}),
    "qwen3_moe": (
        "tp2+spep2dp2",
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 3, "attention_bias": True},
    ),
}
"""layout of 4 ranks, the tiny model that is changed, and its other flags"""


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_other_flags_at_products_of_layouts(pool4: Pool, name: str, tmp_path: Path) -> None:
    layout, family, fields = VARIANTS[name]
    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind)(**settings | fields)
    save(transformers.AutoModelForCausalLM.from_config, config, tmp_path / "fp32")
    expected = expected_of(tmp_path)
    answers = at_layout(pool4, layout, computed, tmp_path, tmp_path / "out", ("fp32",))
    assert differences([answer.rows for answer in answers], expected) <= ATOL
    found = joined({n: g for answer in answers for n, g in answer.gradients.items()})
    check_gradients(found, expected.gradients)
    exported: dict[str, Tensor] = {}
    for file in (tmp_path / "out" / "fp32").glob("*.safetensors"):
        exported |= load_file(file)
    original = load_file(tmp_path / "fp32" / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in original.items())


# --- caps and constants of two models in a distillation ---------------------------------------------------


def test_a_student_and_its_teacher_have_caps_and_divisors_of_their_own(pool1: Pool, tmp_path: Path) -> None:
    """Reverse KL of whole models, each with its own logits, against transformers' probabilities."""
    pairs = {
        "gemma2": ({"final_logit_softcapping": 1.0}, {"final_logit_softcapping": 3.0}),
        "granite": ({"logits_scaling": 2.5}, {"logits_scaling": 0.5}),
    }
    for family, changes in pairs.items():
        kind, settings = FAMILIES[family]
        models = []
        for seed, (name, change) in enumerate(zip(("student", "teacher"), changes, strict=True)):
            config = getattr(transformers, kind)(**settings | change)
            place = tmp_path / family / name
            models.append(save(transformers.AutoModelForCausalLM.from_config, config, place, seed))
        (found,) = at_layout(pool1, "tp1", divergences_of, *models)
        with torch.no_grad():
            p, q = (expected_log_probs(directory) for directory in models)
        expected = (p.exp() * (p - q)).sum(-1)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


ROW = [3, 17, 5, 41, 2, 9, 30, 11, 23, 7, 19, 44, 1, 6]
TEMPERATURE = 0.8


def expected_log_probs(directory: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return (model(torch.tensor([ROW])).logits[0, :-1] / TEMPERATURE).log_softmax(-1)


def divergences_of(mesh: Mesh, student: Path, teacher: Path) -> Any:
    batches = pack_share([TokenSequence(ROW[:1], ROW[1:])], {}, shape_at(mesh, 64), mesh)
    said = against(build_policy(teacher, mesh), batches, ReverseKL())
    ((_, found),) = forward(build_policy(student, mesh), batches, TEMPERATURE, against=said)
    return found.numpy()
