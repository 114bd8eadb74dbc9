"""Samplers: from noise to a latent in 20 or so steps, each one function and one loop.

All of them solve the same equation in the picture scaled up so that only the noise level sigma changes
(Karras et al. 2022, arXiv:2206.00364, section 2):

    dx / dsigma = (x - D(x, sigma)) / sigma,  x = x_t / sqrt(alpha_bar_t),  sigma = sqrt(1 / alpha_bar_t - 1)

where D guesses the clean picture x0.  They differ in the sigmas visited and in the step taken.  DDIM without
noise *is* the Euler step (Song et al. 2020, equation 14, in these coordinates).  Timesteps and their rounding
are those of diffusers, where `timestep_spacing` has its names too; the WebUI's DDIM visits others.

A sampler is one function, the step from sigma to the next lower sigma; the loop around it is sample.py's.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from hanokdiff.models.schedule import Schedule

Noise = Callable[[], Tensor]  # standard normal numbers (B, 4, h, w), new ones at each call
Previous = tuple[Tensor, float] | None  # x0 and sigma of the step before


def euler(x: Tensor, x0: Tensor, sigma: float, after: float, previous: Previous, noise: Noise) -> Tensor:
    """The first-order step (Karras et al. 2022, algorithm 1 without churn); DDIM at DDIM's sigmas."""
    slope = (x - x0) / sigma
    return x + slope * (after - sigma)


def euler_ancestral(x: Tensor, x0: Tensor, sigma: float, after: float, previous, noise: Noise) -> Tensor:
    """Euler to below the next sigma, then up to it with fresh noise (k-diffusion; DDPM's variance, eta 1)."""
    up = math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
    down = math.sqrt(after**2 - up**2)
    slope = (x - x0) / sigma
    x = x + slope * (down - sigma)
    return x + noise() * up if after > 0 else x


def dpmpp_2m(x: Tensor, x0: Tensor, sigma: float, after: float, previous: Previous, noise: Noise) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): extrapolate the last two steps' x0.

    Exact in lambda = -log sigma for a linear D; the first step, and the one to sigma 0, are first order."""
    if after == 0:
        return x0
    h, guess = math.log(sigma / after), x0
    if previous is not None:
        old, old_sigma = previous
        guess = x0 + (x0 - old) * h / (2 * math.log(old_sigma / sigma))
    return (after / sigma) * x - math.expm1(-h) * guess


class Sampler(NamedTuple):
    step: Callable
    spacing: str  # diffusers' default for this sampler
    rounded: bool = False  # the network is asked at whole timesteps only
    karras: bool = False
    to_zero: bool = True  # False: stops at the schedule's smallest sigma (set_alpha_to_one false)


SAMPLERS = {
    "ddim": Sampler(euler, "leading", rounded=True, to_zero=False),
    "euler": Sampler(euler, "linspace"),
    "euler_karras": Sampler(euler, "linspace", karras=True),
    "euler_a": Sampler(euler_ancestral, "linspace"),
    "euler_a_karras": Sampler(euler_ancestral, "linspace", karras=True),
    "dpmpp_2m": Sampler(dpmpp_2m, "linspace", rounded=True),
    "dpmpp_2m_karras": Sampler(dpmpp_2m, "linspace", rounded=True, karras=True),
}
DEFAULT = "dpmpp_2m_karras"


def timesteps(s: Sampler, schedule: Schedule, steps: int) -> np.ndarray:
    """The times visited, from high to low, before any Karras spacing (steps,)."""
    last, spacing = schedule.num_train_timesteps, schedule.timestep_spacing or s.spacing
    points = steps + (s.step is dpmpp_2m)  # diffusers gives 2M one point more and drops the lowest
    if spacing == "leading":
        ts = (np.arange(points) * (last // points))[::-1][:steps] + schedule.steps_offset
    elif spacing == "linspace":
        ts = np.linspace(0, last - 1, points)[::-1][:steps]
    elif spacing == "trailing":
        ts = np.arange(last, 0, -last / steps).round() - 1
    else:
        raise ValueError(f'timestep_spacing "{spacing}" is not known; known: leading, linspace, trailing')
    return ts.round() if s.rounded else ts


def sigmas_and_timesteps(name: str, schedule: Schedule, steps: int) -> tuple[list[float], list[float]]:
    """The noise levels (steps + 1) of a sampler and the times (steps) at which the network is asked."""
    if name not in SAMPLERS:
        raise ValueError(f'sampler "{name}" is not known; choose one of {", ".join(SAMPLERS)}')
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise ValueError(f"steps is {steps}, but must be between 1 and {schedule.num_train_timesteps}")
    s, a = SAMPLERS[name], schedule.alpha_bar.double().numpy()
    table = np.sqrt((1 - a) / a)  # sigma at every timestep, rising
    ts = timesteps(s, schedule, steps)
    sigmas = np.interp(ts, np.arange(len(table)), table)
    # Karras et al. 2022, equation 5, rho 7; diffusers spans what the timesteps above span, 2M the table
    if s.karras:
        high, low = (table[-1], table[0]) if s.step is dpmpp_2m else (sigmas[0], sigmas[-1])
        ramp = np.linspace(0, 1, steps)
        sigmas = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        ts = np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))
        ts = ts.round() if s.rounded else ts
    return [*sigmas.tolist(), 0.0 if s.to_zero else float(table[0])], ts.tolist()


def img2img_steps(steps: int, strength: float) -> int:
    """How many of `steps` an initial picture goes through, as diffusers counts: int(steps * strength)."""
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        must = f"of {steps} steps it must leave at least one"
        least = math.ceil(1000 / steps) / 1000
        raise ValueError(f"strength is {strength:g}: {must}, so give a number from {least:g} to 1")
    return int(steps * strength)


class Plan(NamedTuple):
    """A sampler's steps and where they start."""

    step: Callable  # (x, x0, sigma, after, previous, noise) -> x
    steps: list[tuple[float, float, float]]  # (sigma, the next sigma, the timestep that the UNet is told)
    start: float  # what the first noise is multiplied by


def plan(name: str, schedule: Schedule, steps: int, strength: float | None = None) -> Plan:
    """The steps of a sampler; with `strength`, only those that an initial picture goes through (SDEdit, Meng
    et al. 2021, arXiv:2108.01073): it is noised as far as the first of them."""
    sigmas, ts = sigmas_and_timesteps(name, schedule, steps)
    s = SAMPLERS[name]
    if strength is None:
        exact = s.step is not dpmpp_2m and s.to_zero and (schedule.timestep_spacing or s.spacing) != "leading"
        start = sigmas[0] if exact else math.sqrt(sigmas[0] ** 2 + 1)  # diffusers' init_noise_sigma
    else:
        skipped = steps - img2img_steps(steps, strength)
        sigmas, ts = sigmas[skipped:], ts[skipped:]
        start = sigmas[0]
    return Plan(s.step, list(zip(sigmas, sigmas[1:], ts)), start)
