"""What every metric of metrics.jsonl means: the table behind docs/metrics.md.

A metric of a user's own loss has the name that the loss gives it, and is not in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

SECTIONS: Mapping[str, Mapping[str, str]] = {
    "Rewards and samples": {
        "reward/mean": "Mean reward of the samples of the step.",
        "reward/std": "Standard deviation of the rewards, over n.",
        "reward/no_signal": "Share of the samples whose advantages are all 0.",
        "reward/*": "Mean of this part of the reward, before its weight, over the samples that have it.",
        "void/*": "Samples without a reward, by the reason; `other`: reasons of `Void` beyond the first 16.",
        "length/mean": "Mean response length in tokens.",
        "length/max": "Longest response in tokens.",
        "truncated": "Share of the responses that ended at `rollout.max_new_tokens`.",
        "samples": "Samples that were trained.",
        "aborted": "Samples that were asked for and that the servers aborted.",
        "void": "Samples whose environment or grader failed, those of the replaced groups among them.",
        "sampling/groups": "Groups that the step sampled, with `rollout.dynamic_sampling`.",
        "sampling/dropped": "Those of them that had no signal and were replaced.",
        "sampling/refill_rate": "Their share of the sampled groups.",
        "sampling/reward": "Mean reward of all samples of the step, those of the replaced groups among them.",
        "tokens": "Response tokens of the samples; of supervised training, those that are trained.",
        "data/epoch": "Epochs of the training rows begun before the next step, from 0, without rollouts.",
        "data/*/prompts": "Prompts of the file, in the first record.",
        "data/*/dropped": "Prompts longer than `data.max_prompt_tokens`, which were left out, in the first "
        "record.",
        "data/train/passed_over": "How often in the run so far a prompt turned out to be longer than that "
        "when its turn came; where no such prompt was met, there is none.",
    },
    "Environments": {
        "environment/turns": "Mean responses of a rollout, with `environment.function`.",
        "environment/segments": "Mean training sequences of a rollout: more than one where its context was "
        "rewritten, by the environment or by the chat template.",
        "environment/too_old": "Tokens that were not trained since they were older than "
        "`rollout.max_staleness`, with `environment.outlived` of cut or finish.",
        "environment/resumed": "Rollouts in flight at the checkpoint, of groups that had not finished, that "
        "went on or had ended; in the first record after a resume.",
        "environment/begun_again": "Those that were void and began again from the prompt: their environment "
        "has no `state`, they were too old, or the prompt of that id is another one now; in that record.",
        "environment/rewritten": "Turns whose earlier conversation the chat template wrote anew, so that "
        "they began another training sequence.",
    },
    "Held-out sets": {
        "eval/version": "Step whose weights were evaluated: the step before, where servers generate beside "
        "training.",
        "eval/*/accuracy": "Mean reward over the prompts of a set, of the mean over each one's samples "
        "(mean@k), from a reward function.",
        "eval/*/reward": "The same from a reward model, whose scores are no accuracy.",
        "eval/*/pass@*": "Chance that one of k samples passes, without bias; see docs/evaluation.md.",
        "eval/*/majority@*": "How often the answer that most of k samples give passes.",
        "eval/*/low": "Lower end of the 95 % interval of the metric before it, over prompts.",
        "eval/*/high": "Its upper end.",
        "eval/*/truncated": "Share of the samples that ended at their token limit.",
        "eval/*/length": "Mean response length in tokens.",
        "eval/*/samples": "Samples that have a reward.",
        "eval/*/missing": "Samples that were asked for and have none: aborted by a server, or void.",
        "eval/*/sampled": "Prompts with a sample that has a reward.",
        "eval/*/prompts": "Prompts of the set's file.",
    },
    "Held-out rows": {
        "validation/loss": "The loss of `data.validation`, without a gradient: nats per token (with "
        "`distill`, the divergence), or the mean over pairs, or over verdicts.",
        "validation/perplexity": "exp of it, with `sft`.",
        "validation/*": "The metric `preference/*` of these rows.",
    },
    "Preferences": {
        "preference/accuracy": "Share of the pairs whose chosen answer is ahead, by the loss's own measure; "
        "a draw, to within the rounding of log-probs, is half of one. 0.5 where the policy is still its own "
        "reference.",
        "preference/margin": "By how much, in rewards; mean over the pairs.",
        "preference/chosen": "Reward of the chosen, or desirable, answers: beta x (log-prob - the "
        "reference's), with `orpo` beta x mean log-prob.",
        "preference/rejected": "The same of the rejected, or undesirable ones.",
        "preference/chosen_log_prob": "Log-prob of a chosen answer, the sum over its tokens.",
        "preference/rejected_log_prob": "The same of the rejected ones.",
        "preference/confidence": "Mean of the larger probability that a reward model gives the answers of a "
        "pair: the accuracy, where its scores are calibrated.",
        "preference/reference_point": "z0 of `kto`: mean log-ratio on mismatched prompts and answers.",
    },
    "Loss and policy": {
        "loss/policy": "The objective, mean over the optimizer steps of the step; of supervised "
        "training and distillation, nats per token.",
        "loss/reward_model": "The reward model's loss, mean over the pairs.",
        "loss/value": "The critic's loss, mean over its optimizer steps.",
        "lr/policy": "Learning rate of the step's first update of the policy.",
        "lr/critic": "Learning rate of the step's first update of the critic.",
        "grad_norm": "Norm of the policy's gradient before clipping, mean over the optimizer steps.",
        "grad_norm/critic": "The same of the critic.",
        "ratio/mean": "Importance ratio of the policy to the old one, mean over tokens.",
        "ratio/max": "Largest importance ratio.",
        "ratio/min": "Smallest importance ratio.",
        "clip/fraction": "Share of the tokens whose gradient the loss cuts or fades by more than half.",
        "entropy": "Entropy of the policy, nats per token.",
        "perplexity": "exp of the loss, of supervised training.",
        "kl/rollout": "KL divergence to the policy that sampled, estimator k3, mean over tokens.",
        "kl/reference": "KL divergence to the reference, estimator k3, mean over tokens.",
        "kl/reward": "KL divergence to the reference that the token rewards carry, estimator k1 of the old "
        "policy, mean over tokens.",
        "kl/response": "The same, the sum over the tokens of a response, mean over responses: what "
        "`algorithm.params.kl_target` is for.",
        "kl/coefficient": "Its coefficient in the token rewards, adapted where there is a target.",
        "masked/fraction": "Share of the tokens with a recorded log-prob that is not finite; they count for "
        "nothing.",
        "observation/nll": "Mean of -log_prob of the tokens between the turns, where they are learnt too.",
        "baseline/mean": "Mean of what rewards are compared with: greedy answers, or the means of roles.",
        "correction/mean": "Mean weight of the correction for another sampling policy.",
        "value/mean": "Mean of the critic's values.",
        "value/explained_variance": "1 - Var(return - value) / Var(return).",
        "value/clip_fraction": "Share of the tokens whose value gradient is cut.",
        "return/mean": "Mean return.",
        "head/grad_measured": "Measured scale of the gradient at the lm_head; see docs/algorithms.md.",
        "head/grad_predicted": "The scale that the entropy and the advantages predict.",
        "head/grad_ratio": "Measured over predicted.",
        "head/grad_ratio_on_policy": "The same of the first mini-batch of the rollout, to which the bound "
        "applies.",
    },
    "Servers and weights": {
        "mismatch/max_abs": "Largest difference of a log-prob, server against trainer, on tokens of the "
        "weights in training.",
        "mismatch/p999": "99.9 % quantile of these differences, in 20 bins per decade; of 100 to 1000, "
        "the second largest.",
        "mismatch/dropped": 'Samples that `publish.mismatch_action = "drop"` left out.',
        "behaviour/k1": "KL divergence k1 of the policy that sampled (stale, or another engine) to the old "
        "one.",
        "behaviour/k3": "The same by k3.",
        "behaviour/ess": "Effective sample size of the importance weights over the number of tokens; 1: no "
        "difference.",
        "behaviour/max_abs": "Largest difference of a log-prob between the two.",
        "weight_version": "Version of the weights that was published after the step.",
        "publish/probe_max_abs": "Largest difference of a log-prob after the publish, servers against "
        "trainer.",
        "publish/stale_max_abs": "The same before it: what the comparison would have seen of the previous "
        "weights.",
        "publish/adapter_share": "How much of what the adapters change a server answers with: 1 with them, "
        "0 if it has the frozen model; the smallest of the servers.",
        "publish/moved_max_abs": "By how much the publish changed a server's own log-probs; the smallest of "
        "the servers.",
        "rollout/servers": "Servers that hold the published version.",
        "async/asked": "Samples ever asked for, with `rollout.max_staleness` of 1 and more.",
        "async/trained": "Samples ever trained.",
        "async/in_flight": "Samples in flight.",
        "async/discarded_aborted": "Samples ever aborted by a server.",
        "async/discarded_no_signal": "Samples ever replaced since the rewards of their group were equal.",
        "async/discarded_void": "Samples ever left out since their environment or grader failed, or since a "
        "crash ended a rollout that cannot go on.",
        "async/discarded_stale": "Samples ever discarded since they were too old.",
        "async/discarded_unfinished": "Samples ever discarded since the step had enough.",
        "staleness/mean": "Weight versions between sampling and training, mean over tokens.",
        "staleness/max": "The largest of these.",
        "staleness/mixed": "Share of the samples that more than one version sampled.",
    },
    "Time and memory": {
        "time/step": "Seconds since the last record.",
        "time/rollout": "Seconds in which the lead waited for samples to train on.",
        "time/reward": "Seconds of giving them rewards.",
        "time/score": "Seconds of log-probs and values before the first update.",
        "time/train": "Seconds of the updates.",
        "time/publish": "Seconds of the publish and its check.",
        "time/eval": "Seconds of the evaluation, its samples and rewards included.",
        "time/save": "Seconds in which training waited for a checkpoint.",
        "time/release": "Seconds in which servers on the same GPUs gave up their memory.",
        "throughput/tokens_per_second": "Prompt and response tokens of the step over `time/step`.",
        "throughput/train_tokens_per_second": "Prompt and response tokens, once per epoch, over "
        "`time/train`.",
        "throughput/mfu": "FLOPs of the policy's updates, recomputation not counted, over `time/train` and "
        "the "
        "GPUs' dense bf16 peak; null on a CPU.",
        "memory/peak_gib": "The most memory that any rank has held since the start: of torch on a GPU, of "
        "the "
        "process on a CPU, in 2^30 bytes.",
    },
}
"""section -> metric, with `*` for any word -> meaning"""

_LONGEST = sorted(
    (entry for table in SECTIONS.values() for entry in table.items()),
    key=lambda entry: not entry[0].endswith(("/low", "/high")),
)
"""ends of intervals first: theirs are names of metrics with a word behind them"""

MEASURED = ("time/", "throughput/", "memory/")
"""what begins so is of the machine: it differs between runs whose numbers are equal"""

_HEAD = """# Metrics

`RUN_DIR/metrics.jsonl` has one JSON object per step, `step` included; step 0 is the record before the first
update. A value that is not finite is written as null and named under `non_finite`. A metric that has no value
in a step is left out. The report draws all of them. A loss of your own adds metrics of its own
([algorithms.md](algorithms.md)).
"""


RIGHT_OR_WRONG = ("mcore_rl.rewards.exact:", "mcore_rl.rewards.math_answer:", "mcore_rl.rewards.answers:")
"""reward functions that give 1 or 0, and nothing else"""
_NO_REWARD = ("mcore_rl.environments.tools:",)
"""environments that leave the reward to the function; others may say it themselves"""


def held_out_word(function: str | None, environment: str | None = None) -> str:
    """What people call a held-out mean reward: `accuracy` of what is right or wrong, else `reward`."""
    decides = environment is None or environment.startswith(_NO_REWARD)
    return "accuracy" if decides and (function or "").startswith(RIGHT_OR_WRONG) else "reward"


def meaning_of(name: str) -> str | None:
    """What the metric `name` means; None where the table does not have it."""
    return next(
        (text for known, text in _LONGEST if fnmatchcase(name, known)),
        None,
    )


def as_markdown() -> str:
    """The page docs/metrics.md."""
    parts = [_HEAD]
    for title, table in SECTIONS.items():
        rows = [f"| `{name}` | {meaning} |" for name, meaning in table.items()]
        parts.append("\n".join([f"## {title}", "", "| metric | meaning |", "|---|---|", *rows, ""]))
    return "\n".join(parts)
