"""The denoising loss that all four methods share, and its weight.

    L = w(t) || eps - eps_theta(x_t, t, words) ||^2,     x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps

Ho et al. 2020 (DDPM), equation 14; w = 1, or min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556, equation 6).
"""

import torch
from torch import Tensor

from hanokdiff.models import memory
from hanokdiff.models.schedule import Schedule


def denoising_loss(sd, latents: Tensor, context: Tensor, batch, min_snr: float = 0.0) -> Tensor:
    """One loss per picture (B,): latents x_0 (B, 4, h, w) and context (B, T, D) with the batch's own t and noise."""
    eps = memory.to_device(batch.normal("noise", latents.shape[1:]), latents.device)
    t = memory.to_device(batch.integers("timestep", sd.schedule.num_train_timesteps), latents.device)
    x_t = sd.schedule.add_noise(latents, eps, t)
    out = sd.unet(x_t.to(sd.dtype), t, context.to(sd.dtype)).float()
    losses = (out - sd.schedule.target(latents, eps, t)).square().mean((1, 2, 3))
    return losses * min_snr_weight(sd.schedule, t, min_snr) if min_snr else losses


def min_snr_weight(schedule: Schedule, t: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR for eps, / (SNR + 1) for v, at timesteps t (B,)."""
    snr = schedule.snr(t)
    return torch.clamp(snr, max=gamma) / (snr if schedule.prediction_type == "epsilon" else snr + 1)
