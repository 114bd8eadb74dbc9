"""Intervals of means, shares and differences; p-values of differences.

Student's t with `freedom` degrees of freedom: with t = sqrt(freedom) tan(angle) its density on a quarter
circle is cos(angle)^(freedom - 1), which is summed by trapezoids.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from torch import Tensor


def mean_interval(values: Sequence[float] | Tensor, confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high), the interval Student's t over the values; of one value low and high are nan."""
    v = np.asarray(values, dtype=np.float64)
    if not len(v):
        raise ValueError("the mean of 0 values does not exist; score at least 1")
    if len(v) == 1:
        return float(v[0]), math.nan, math.nan
    half = t_quantile(len(v) - 1, confidence) * v.std(ddof=1) / math.sqrt(len(v))
    return float(v.mean()), float(v.mean() - half), float(v.mean() + half)


def paired_interval(
    a: Sequence[float] | Tensor, b: Sequence[float] | Tensor, confidence: float = 0.95
) -> tuple[float, float, float]:
    """(mean, low, high) of a - b over pairs, a[i] with b[i]: what both share (prompt, noise) drops out."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"{len(a)} values cannot be paired with {len(b)}; give a value of each for every pair"
        )
    return mean_interval(a - b, confidence)


@lru_cache
def t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """The t with P(|T| < t) = confidence."""
    angle = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    p = np.append(0, np.cumsum(density[1:] + density[:-1]))  # trapezoids
    inside = p <= confidence * p[-1] * (1 + 1e-3)  # beyond, p is flat, and np.interp wants it to rise
    return math.sqrt(freedom) * math.tan(np.interp(confidence * p[-1], p[inside], angle[inside]))


def t_tail(t: float, freedom: int) -> float:
    """P(|T| > |t|)."""

    def area(low: float) -> float:
        density = np.cos(np.linspace(low, math.pi / 2, 20_001)) ** (freedom - 1)
        return (math.pi / 2 - low) * (density.sum() - (density[0] + density[-1]) / 2) / 20_000

    return float(area(math.atan(abs(t) / math.sqrt(freedom))) / area(0))


def holm(p: list[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the smallest times m, the next times m - 1, never
    falling."""
    out, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        out[i] = worst
    return out


def share_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """(share, low, high) of k in n: Wilson 1927, which stays within 0 and 1 and is honest at both ends."""
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"{k} of {n} is no share; n must be at least 1, and k from 0 to n")
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), k / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # at k = 0 and k = n one end is p itself, but for rounding
    low, high = ((middle + s * half) / (1 + z * z / n) for s in (-1, 1))
    return p, 0.0 if k == 0 else low, 1.0 if k == n else high
