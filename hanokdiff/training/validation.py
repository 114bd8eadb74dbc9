"""The loss of photos that are not trained on."""

import torch

from hanokdiff.methods.losses import denoising_loss
from hanokdiff.training.noise import Batch


@torch.no_grad()
def validation_loss(sd, dataset, at_once: int = 8) -> float:
    """The mean loss of photos that are not learnt from, unweighted, each at a timestep and a noise that are the same
    every time: what falls and then rises again as a model goes over from learning to learning by heart."""
    n, losses = len(dataset), []
    for first in range(0, n, at_once):
        batch = Batch("held out", 0, range(first, min(first + at_once, n)), n)
        latents, prompts = dataset[batch]
        losses.append(denoising_loss(sd, latents, sd.text(prompts), batch))
    return torch.cat(losses).mean().item()
