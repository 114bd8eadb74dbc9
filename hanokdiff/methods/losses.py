"""The denoising loss and its weight.

    L = w(t) || eps - eps_theta(x_t, t, words) ||^2,   x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps

Ho et al. 2020 (DDPM), equation 14; w = 1, or min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556, equation 6).
"""

import torch
from torch import Tensor

from hanokdiff.models.schedule import Schedule


def mse(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each picture: two (B, 4, h, w) -> (B,)."""
    return (pred - target).square().mean((1, 2, 3))


def min_snr_weight(schedule: Schedule, t: Tensor, gamma: float) -> Tensor | float:
    """min(SNR, gamma) / SNR for eps, / (SNR + 1) for v, at timesteps t (B,); gamma 0: weight 1 at all."""
    if not gamma:
        return 1.0
    snr = schedule.snr(t)
    return torch.clamp(snr, max=gamma) / (snr if schedule.prediction_type == "epsilon" else snr + 1)
