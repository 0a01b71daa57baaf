"""The schedule of the Gumbel-softmax temperature, a pure function of training progress."""

from __future__ import annotations

import math


def temperature_at(fraction: float, start: float, end: float, select_fraction: float, anneal: str) -> float:
    """Gumbel-softmax temperature after a share `fraction` (0..1) of training.

    The temperature falls from `start` at 0 to `end` at `select_fraction` and stays there:

        exponential   start (end / start)^t
        linear        start + t (end - start)
        cosine        end + (start - end) (1 + cos(pi t)) / 2

    with `t = fraction / select_fraction`, at most 1.
    """
    t = 1.0 if fraction >= select_fraction else fraction / select_fraction
    if anneal == "exponential":
        return float(start * (end / start) ** t)
    if anneal == "linear":
        return start + t * (end - start)
    if anneal == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * t)) / 2
    raise ValueError(f"anneal must be 'exponential', 'linear' or 'cosine'; got {anneal!r}")
