"""Balance over ranks: real FLOPs, the promised ratios, and the same answer on every rank."""

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.balance import lognormal_lengths
from mcore_rl.data.balance import ModelShape, balance, forward_flops, max_over_mean, model_shape
from mcore_rl.errors import ConfigError, DataError, LayoutError

LLAMA_70B = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
QWEN3_30B_A3B = {
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
}


def test_flops_of_a_dense_model_by_hand():
    shape = model_shape(LLAMA_70B)
    s, h = 1000.0, 8192
    per_layer = 2 * h * (12.75 * h * s + s * s)
    assert forward_flops([1000], shape, [10]) == pytest.approx(
        [80 * per_layer + 2 * h * 128256 * 10], rel=1e-12
    )


def test_parameters_times_two_tokens_bounds_the_flops_of_a_short_sequence():
    """2 x active parameters per token, the usual rule, holds where attention is negligible."""
    flops = forward_flops([1], model_shape(QWEN3_30B_A3B))[0]
    assert flops / 2 == pytest.approx(3.03e9, rel=0.01)  # A3B less the input embedding


def test_only_active_experts_and_sparse_layers_count():
    half = model_shape({**QWEN3_30B_A3B, "decoder_sparse_step": 2})
    assert half.ffn == (8 * 768 + 6144) / 2
    assert half.experts == 64
    first = model_shape({**QWEN3_30B_A3B, "mlp_only_layers": [0], "shared_expert_intermediate_size": 100})
    assert first.ffn == pytest.approx((47 * (8 * 768 + 100) + 6144) / 48)


def test_experts_by_the_names_of_other_families():
    glm = {**QWEN3_30B_A3B, "num_experts": None, "n_routed_experts": 64, "first_k_dense_replace": 2}
    shape = model_shape({**glm, "n_shared_experts": 1})
    assert shape.ffn == pytest.approx((46 * 9 * 768 + 2 * 6144) / 48)
    assert shape.experts == pytest.approx(64 * 46 / 48)
    mixtral = {**QWEN3_30B_A3B, "num_experts": None, "num_local_experts": 8, "moe_intermediate_size": None}
    assert model_shape({**mixtral, "num_experts_per_tok": 2}).ffn == 2 * 6144


def test_a_missing_number_is_named():
    with pytest.raises(ConfigError, match=r"config.json: hidden_size is missing"):
        model_shape({k: v for k, v in LLAMA_70B.items() if k != "hidden_size"})


@pytest.mark.parametrize(
    ("samples", "ranks", "limit"),
    [
        (512, 16, 1.002),
        (2048, 64, 1.002),
        (4096, 16, 1.002),
        (4096, 128, 1.002),
        (64, 8, 1.01),
        (512, 64, 1.01),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_the_promised_ratios(samples, ranks, limit, seed):
    costs = forward_flops(lognormal_lengths(samples, seed), model_shape(LLAMA_70B))
    bound = max(1.0, costs.max() * ranks / costs.sum())
    assert max_over_mean(costs, balance(costs, ranks)) <= limit * bound


def test_round_robin_would_fail_the_promise():
    costs = forward_flops(lognormal_lengths(2048, 0), model_shape(LLAMA_70B))
    assert max_over_mean(costs, [range(rank, 2048, 64) for rank in range(64)]) > 1.1


def test_4096_samples_take_at_most_50_ms_of_cpu():
    costs = forward_flops(lognormal_lengths(4096, 0), model_shape(LLAMA_70B))
    for ranks in (16, 128):
        times = []
        for _ in range(3):
            start = time.process_time()
            balance(costs, ranks)
            times.append(time.process_time() - start)
        assert min(times) <= 0.050


costs_lists = st.lists(st.floats(0, 1e18), max_size=40)


@given(costs_lists, st.integers(1, 9))
def test_every_sequence_is_on_one_rank_and_no_rank_is_worse_than_grahams_bound(costs, ranks):
    parts = balance(costs, ranks)
    assert sorted(index for part in parts for index in part) == list(range(len(costs)))
    assert len(parts) == ranks
    loads = [sum(costs[i] for i in part) for part in parts]
    # list scheduling (Graham 1969); items below 2^-40 of the largest count as that much
    assert max(loads) <= (sum(costs) / ranks + max(costs, default=0)) * (1 + 1e-9)


@given(costs_lists, st.integers(1, 5), st.sampled_from([2.0**-30, 0.5, 2.0**20]))
def test_the_unit_of_cost_does_not_matter(costs, ranks, unit):
    scaled = [cost * unit for cost in costs]
    if all(cost == 0 or cost > 1e-200 for cost in costs):
        assert balance(scaled, ranks) == balance(costs, ranks)


def test_samples_without_cost_are_spread_too():
    assert [len(part) for part in balance([0.0] * 6, 3)] == [2, 2, 2]
    assert balance([], 2) == [[], []]
    assert max_over_mean([], [[], []]) == 1.0


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -1.0])
def test_a_cost_that_is_no_cost_is_refused(cost):
    with pytest.raises(DataError, match="cost of sequence 1 is"):
        balance([1.0, cost], 2)


def test_no_ranks():
    with pytest.raises(LayoutError, match="0 ranks"):
        balance([1.0], 0)


def test_a_window_cuts_a_triangle_off_the_causal_half() -> None:
    """Counted pair by pair; the continuous form, which is used, is off by half a pair per token."""
    shape = ModelShape(layers=4, hidden=4, heads=2, kv_heads=1, head_dim=2, vocab=5, ffn=8)
    near = replace(shape, windowed=3, window=100)
    pairs = sum(max(0, query + 1 - 100) for query in range(1000))  # that 3 layers do not compute
    saved = forward_flops([1000], shape)[0] - forward_flops([1000], near)[0]
    assert saved == pytest.approx(3 * pairs * 4 * shape.heads * shape.head_dim, rel=2e-3)
    assert forward_flops([100], near) == forward_flops([100], shape)


def test_a_shape_can_be_given_by_hand():
    tiny = ModelShape(layers=1, hidden=4, heads=2, kv_heads=1, head_dim=2, vocab=5, ffn=8)
    # projections 2*4*(8+4), SwiGLU 6*4*8, causal attention 2*4*s, head 2*4*5 per token
    assert forward_flops([3], tiny)[0] == 3 * (96 + 192) + 2 * 4 * 9 + 3 * 40
