"""The loss of supervised training on labels that it does not train on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mcore_rl.data.packing import TokenSequence
from mcore_rl.data.reader import encode
from mcore_rl.errors import DataError
from mcore_rl.model.build import Model
from mcore_rl.training.batch import Shape
from mcore_rl.training.evaluation_sets import EvalSet
from mcore_rl.training.model_passes import log_probs


@dataclass(frozen=True)
class LabelLoss:
    """Measures a policy on the labels of held-out sets."""

    policy: Model
    shape: Shape
    """how its micro-batches are made"""
    tokenizer: PreTrainedTokenizerBase
    end: int
    """token that ends a label"""
    longest: int
    """tokens of a prompt and its label, end of sequence included, that can be trained on"""

    def __call__(self, sets: Sequence[EvalSet]) -> dict[str, float]:
        """`eval/NAME/loss`: mean nats per label token, end of sequence included, over a set's prompts.

        `eval/NAME/labels` says how many prompts these are: those whose label is a text that the tokenizer can
        encode and that fits. A set without one has neither metric. Collective.
        """
        found: dict[str, float] = {}
        for one in sets:
            sequences = list(self._labelled(one))
            if not sequences:
                continue
            scored = log_probs(self.policy, sequences, self.shape, 1.0)
            tokens = [float(log_prob) for its in scored for log_prob in its]
            found[f"eval/{one.name}/loss"] = -math.fsum(tokens) / len(tokens)
            found[f"eval/{one.name}/labels"] = float(len(sequences))
        return found

    def _labelled(self, one: EvalSet) -> Iterator[TokenSequence]:
        for prompt in one.prompts:
            if not isinstance(prompt.label, str) or not prompt.label:
                continue
            try:
                label = encode(prompt.id, prompt.label, self.tokenizer)
            except DataError:  # a reward may read it all the same
                continue
            sequence = TokenSequence(prompt.token_ids, [*label, self.end])
            if len(sequence) <= self.longest:
                yield sequence
