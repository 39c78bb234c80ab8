"""Settings that are accepted by type and range, and whose effect is nothing, or not what the name says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from mcore_rl.algo import losses, masked_losses, sequence_losses
from mcore_rl.algo.advantages import group_normalized
from mcore_rl.algo.algorithms import Algorithm, configure, has_critic
from mcore_rl.algo.baselines import best_of_group
from mcore_rl.algo.rows import TokenLoss
from mcore_rl.config.sections import AlgorithmConfig, RolloutConfig
from mcore_rl.errors import ConfigError

_CLIP = ("eps_low", "eps_high", "dual_clip")
_BOUNDS: Mapping[Callable[..., TokenLoss], tuple[str, ...]] = {
    losses.ppo: _CLIP,
    losses.gspo: _CLIP,
    losses.cispo: _CLIP,
    losses.deepseek_masked: _CLIP,
    losses.sapo: ("tau_pos", "tau_neg"),
    sequence_losses.gspo_kept: _CLIP,
    sequence_losses.sapo_sequence: ("tau_pos", "tau_neg"),
    sequence_losses.fipo: (*_CLIP, "half_life", "weight_low", "weight_high"),
    sequence_losses.gmpo: ("clip_low", "clip_high"),
    masked_losses.clip_cov: _CLIP,
    masked_losses.kl_cov: ("fraction", "penalty"),
    masked_losses.dro: ("tau",),
}
"""losses of the ratio to the old policy -> parameters that do nothing where it is 1"""


def params_without_effect(algorithm: Algorithm, given: Mapping[str, object]) -> Iterator[str]:
    """`algorithm.params.key: what, remedy` for what would change nothing.

    Args:
        algorithm: with what was `given` in place.
    """
    place = "algorithm.params"
    if algorithm.kl_in_loss and algorithm.kl_estimator == "k1":
        yield (
            f"{place}.kl_estimator: the gradient of k1 in the loss is 0 in expectation, whatever the KL; "
            "set k2, k3 or k1_iw"
        )
    needless = _needless(algorithm)
    for key in given:
        if key in needless:
            yield f"{place}.{key}: has no effect because {needless[key]}"
    if algorithm.advantage is group_normalized:
        for key, why in _of_normalized(algorithm).items():
            if key in given:
                yield f"{place}.{key}: has no effect because {why}; remove it"


def _needless(algorithm: Algorithm) -> dict[str, str]:
    """Parameters that change nothing -> why, and what to do."""
    found: dict[str, str] = {}
    if not algorithm.kl_in_loss:
        found |= dict.fromkeys(("kl_estimator", "kl_cap"), "kl_in_loss is 0; remove it, or set kl_in_loss")
    if algorithm.kl_target is None:
        found["kl_horizon"] = "there is no kl_target; remove it, or set kl_target"
    if not algorithm.whiten:
        found["whiten_ddof"] = "nothing is whitened; remove it, or set whiten"
    if not algorithm.per_token:
        found["gae_steps"] = "a sample has one advantage; remove it"
    if algorithm.advantage is best_of_group:
        found |= dict.fromkeys(("eps_low", "dual_clip"), "no advantage is negative; remove it")
    return found


def _of_normalized(algorithm: Algorithm) -> dict[str, str]:
    """Parameters of `group_normalized` that change nothing -> why."""
    std = algorithm.advantage_params["std"]
    if std == "none":
        keys = ("ddof",) if algorithm.decoupled else ("ddof", "eps")  # the sum of the parts is scaled by eps
        return dict.fromkeys(keys, 'std is "none"')
    if algorithm.decoupled:
        return {"ddof": "the sum of the parts is divided by its own spread"}
    if not algorithm.whiten:
        return {}
    keys = ("ddof",) if std == "group" else ("std", "ddof", "eps")
    return dict.fromkeys(keys, "whiten divides the advantages of the batch by their spread once more")


def doubtful(
    algorithm: Algorithm,
    given: Mapping[str, object],
    *,
    updates: int,
    stale: bool,
    rates: Mapping[str, float],
    tokens: int,
) -> Iterator[str]:
    """What a run may do and hardly means, for a warning.

    Args:
        updates: optimizer steps on one rollout.
        tokens: that a response may have.
        stale: samples may be of older weights.
        rates: key -> learning rate of every model in training.
    """
    for key, rate in rates.items():
        if rate == 0:
            yield f"{key}: 0, so that nothing is learned"
    if algorithm.loss is losses.reinforce and updates > 1:
        yield (
            f"algorithm.mini_batches: the loss has no importance ratio, and after the first of {updates} "
            "updates the samples are another policy's; set mini_batches = 1 and epochs = 1"
        )
    factor = algorithm.advantage_params.get("length_factor")
    if isinstance(factor, float) and factor * tokens <= 1:
        yield (
            f"algorithm.params.length_factor: with {factor:g} lambda is 0 for a response of {tokens} tokens, "
            f"the longest, and the reward counts for its last token alone; set {20 / tokens:.2g} for 0.95"
        )
    bounds = [key for key in _BOUNDS.get(algorithm.loss, ()) if key in given]
    if bounds and updates == 1:
        yield (
            f"algorithm.params.{bounds[0]}: has no effect in the only update of a rollout, where every "
            "importance ratio is 1; set mini_batches or epochs higher, or remove it"
        )
    if "delta" in given and updates == 1 and not stale and algorithm.loss is losses.deepseek_masked:
        yield (
            "algorithm.params.delta: has no effect where the weights that sample are those that train; set "
            "mini_batches, epochs or rollout.max_staleness higher, or remove it"
        )


def wrong_algorithm(chosen: AlgorithmConfig, rollout: RolloutConfig, *, plays: bool) -> Iterator[str]:
    """`section.key: what, remedy` for what the algorithm of an RL run cannot go together with.

    Args:
        plays: an environment makes the samples.
    """
    try:
        algorithm = configure(chosen.name, chosen.params, chosen.loss)
    except ConfigError as error:
        yield str(error)
        return
    yield from params_without_effect(algorithm, chosen.params)
    if algorithm.observation_nll and not plays:
        named = "observation_nll" not in chosen.params
        place, remedy = ("name", "another algorithm") if named else ("params.observation_nll", "0")
        yield (
            f"algorithm.{place}: without environment.function nothing is observed between turns, and nothing "
            f"of it learned; set one, or {remedy}"
        )
    if algorithm.baseline == "greedy" and plays:
        yield (
            f"algorithm.name: {chosen.name} compares with one greedy response, and a rollout of "
            "environment.function is more than one; take another algorithm"
        )
    if rollout.max_staleness and not (algorithm.corrects or algorithm.rules or algorithm.off_policy):
        yield (
            "rollout.max_staleness: samples of older weights would count as if the present ones had drawn "
            'them; set algorithm.params.correction = "tis-token" (or another one), or max_staleness = 0'
        )
    if rollout.dynamic_sampling and not algorithm.compares:
        yield (
            f"rollout.dynamic_sampling: {chosen.name} does not compare the samples of a prompt, "
            "and learns from equal rewards too; drop it"
        )
    if rollout.dynamic_sampling == 1:
        yield (
            "rollout.dynamic_sampling: with 1 a step may replace no group, and the first without a signal "
            "ends the run; set 2 or more, or 0"
        )
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    if algorithm.kl_target is not None and algorithm.kl_horizon < samples:
        yield (
            f"algorithm.params.kl_horizon: {algorithm.kl_horizon:g} is shorter than the {samples} samples of "
            "a step, over which the coefficient would jump; raise it"
        )
    of_pass = algorithm.advantage_params.get("k")
    if algorithm.compares and isinstance(of_pass, int) and of_pass >= rollout.samples_per_prompt > 1:
        yield (
            f"algorithm.params.k: {of_pass} of {rollout.samples_per_prompt} samples of a prompt leave "
            "nothing to compare, and every advantage is 0; lower it, or raise rollout.samples_per_prompt"
        )
    if algorithm.compares and rollout.samples_per_prompt == 1:
        yield (
            f"rollout.samples_per_prompt: {chosen.name} compares the samples of a prompt, and "
            "with one every advantage is 0; set 2 or more"
        )


def needs_reference(chosen: AlgorithmConfig) -> bool:
    """The algorithm asks a frozen model; False where `wrong_algorithm` says that it is wrong."""
    try:
        return configure(chosen.name, chosen.params, chosen.loss).needs_reference
    except ConfigError:
        return False


def needs_critic(name: str) -> bool:
    """The algorithm, or preset, of that name trains a critic."""
    return has_critic(name)
