"""The loss of photos that are not trained on."""

import torch
from torch import Tensor

from hanokdiff.training.noise import Batch


def denoising_losses(sd, dataset, batch: Batch) -> Tensor:
    """The loss of each picture of a batch (B,), unweighted."""
    x0, prompts = dataset[batch]
    noise, t = batch.normal(x0.shape), batch.timesteps(sd.schedule.num_train_timesteps)
    pred = sd.unet(sd.schedule.add_noise(x0, noise, t), t, sd.text(prompts))
    return (pred - sd.schedule.target(x0, noise, t)).square().mean((1, 2, 3))


@torch.no_grad()
def validation_loss(sd, dataset, at_once: int = 8) -> float:
    """The mean denoising loss of a data set, unweighted, every photo at a timestep and a noise that are the
    same each time: it falls while training helps and rises again when the model overfits."""
    n, losses = len(dataset), []
    for first in range(0, n, at_once):
        indices = range(first, min(first + at_once, n))
        batch = Batch("held out", 0, indices, n, device=dataset.device)
        losses.append(denoising_losses(sd, dataset, batch))
    return torch.cat(losses).mean().item()
