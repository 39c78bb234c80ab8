"""Built-in verifiable reward: the answer is the label."""

from __future__ import annotations

from mcore_rl.types import Sample


def exact_match(sample: Sample) -> float:
    """1.0 when the response equals the label, surrounding white space apart, else 0.0.

    A label that is no string is compared as JSON writes it: the number 4 with `4`, true with `true`.
    """
    return float(sample.text.strip() == sample.prompt.label_text.strip())
