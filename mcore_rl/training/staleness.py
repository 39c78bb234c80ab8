"""How old the weights were that sampled a token, in weight versions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mcore_rl.types import Sample, VersionSpan


def token_ages(samples: Sequence[Sample], version: int) -> list[np.ndarray]:
    """[N] of [m_i]: weight versions from the one that sampled each token to `version`."""
    return [
        np.concatenate([np.zeros(0), *(np.full(s.end - s.start, version - int(s.version)) for s in spans)])
        for spans in map(_spans, samples)
    ]


def staleness_metrics(samples: Sequence[Sample], version: int) -> dict[str, float]:
    """Over tokens, mean and largest age; over samples, the share that more than one version sampled."""
    ages = np.concatenate([np.zeros(0), *token_ages(samples, version)])
    mixed = [len({span.version for span in _spans(sample)}) > 1 for sample in samples]
    return {
        "staleness/mean": float(ages.mean()) if ages.size else 0.0,
        "staleness/max": float(ages.max(initial=0.0)),
        "staleness/mixed": float(np.mean(mixed)) if mixed else 0.0,
    }


def _spans(sample: Sample) -> list[VersionSpan]:
    return [span for segment in sample.segments for span in segment.versions]
