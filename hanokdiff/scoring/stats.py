"""Intervals of means, shares and differences; p-values of differences between sets.

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


def paired_interval(a: Sequence[float], b: Sequence[float], confidence=0.95) -> tuple[float, float, float]:
    """(mean, low, high) of a - b over pairs, a[i] with b[i]: what both share (prompt, noise) drops out."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        pairs = f"{len(a)} values cannot be paired with {len(b)}"
        raise ValueError(f"{pairs}; give a value of each for every pair")
    return mean_interval(a - b, confidence)


@lru_cache
def t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """The t with P(|T| < t) = confidence."""
    angle = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    p = np.append(0, np.cumsum(density[1:] + density[:-1]))  # trapezoids
    inside = p <= confidence * p[-1] * (1 + 1e-3)  # beyond, p is flat, and np.interp wants it to rise
    return math.sqrt(freedom) * math.tan(np.interp(confidence * p[-1], p[inside], angle[inside]))


def two_stage_interval(drawn: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of the mean over sets by a bootstrap over sets, then pictures (Davison and Hinkley 1997,
    section 3.8). drawn (R, S): for each of R resamples, what other pictures of each set might show."""
    chosen = np.random.default_rng(1).integers(drawn.shape[1], size=drawn.shape)
    means = np.take_along_axis(drawn, chosen, 1).mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


RESAMPLES = 4000


def share_over_sets(counts: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """(mean share, low, high) of k in n for each set. Of a set's pictures, others might show a share drawn
    from Jeffreys' posterior: 16 of 16 is not certainty. Few equal sets make it too narrow."""
    k, n = np.array(counts, dtype=np.float64).T
    drawn = np.random.default_rng(0).beta(k + 0.5, n - k + 0.5, size=(RESAMPLES, len(k)))
    mean = float((k / n).mean())
    low, high = two_stage_interval(drawn)
    return mean, min(low, mean), max(high, mean)


def mean_over_sets(means: Sequence[tuple[float, float, int]]) -> tuple[float, float, float]:
    """(mean, low, high) of (mean, standard deviation, number) of each set's pictures."""
    m, s, n = np.array(means, dtype=np.float64).T
    drawn = m + s / np.sqrt(n) * np.random.default_rng(0).standard_normal((RESAMPLES, len(m)))
    return float(m.mean()), *two_stage_interval(drawn)


EXACT = 14  # sets up to which all sign flips are counted


def sign_flip(differences: Sequence[float]) -> tuple[float, float]:
    """(p, the smallest p that so many sets can give) of the hypothesis that each set's difference is as
    likely to have the other sign: the share of sign flips whose mean is at least as far from 0 (Fisher 1935).
    Two-sided; exact up to 14 sets, beyond them 20,000 random flips and the observed one."""
    d = np.asarray(differences, dtype=np.float64)
    n = len(d)
    if n <= EXACT:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        floor = min(1.0, 2.0 ** (1 - n))
    else:
        signs = np.random.default_rng(0).choice([-1, 1], size=(20_000, n))
        signs = np.vstack([np.ones(n, int), signs])
        floor = 1 / len(signs)
    far = np.abs(signs @ d) >= abs(d.sum()) - 1e-9
    return float(far.mean()), floor


def holm(p: list[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the smallest times m, the next m - 1, not falling."""
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
