"""The hidden true score of the tiny RLHF task: it judges the pairs and evaluates; nothing trains on it."""

from __future__ import annotations

from mcore_rl.types import Sample


def true_score(prompt: str, response: str) -> float:
    """The share of the response's characters that the prompt has too, the equals sign aside; 0 if empty."""
    known = set(prompt) - {"="}
    return sum(character in known for character in response) / max(len(response), 1)


def score(sample: Sample) -> float:
    """The true score of a sample, for held-out sets."""
    return true_score(sample.prompt.text, sample.text)
