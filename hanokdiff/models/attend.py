"""Attend-and-Excite: move the latent so that each named word is attended to.

Chefer et al. 2023, arXiv:2301.13826:

    A = softmax over the words (100 * cross-attention, mean of layers and heads)     (N positions, T words)
    L = max over the named words s of (1 - max over the positions of smoothed A_s)   equation 1
    x_t <- x_t - alpha_t grad L                                                      equation 2

In the first half of the steps; at the start, and after a fifth and two fifths of all steps, again until the
least attended word reaches 0.05, 0.5 and 0.8. The paper's maps are 16x16; here the nearest level's. One part.
"""

import functools
import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanokdiff.models.memory import cross_attentions, replaced_forwards
from hanokdiff.models.prompt_schedule import at_steps

SCALE = 20.0  # alpha at the first step; it falls to 1 / sqrt(2) of it
REFINED = {0.0: 0.05, 0.2: 0.5, 0.4: 0.8}  # share of the steps -> attention to be reached
MOST_REFINEMENTS = 20
POSITIONS = 16 * 16  # of the paper's maps


class Attend:
    """The words of a batch of prompts, and where they stand at each step."""

    def __init__(self, sd, prompts: list[str], words: list[str], steps: int, scale: float = SCALE):
        self.sd, self.steps, self.scale = sd, steps, scale
        readings = [at_steps(p, steps) for p in prompts]
        self.places = [[word_places(sd.text, r[i][0][0], words) for r in readings] for i in range(steps)]
        self.targets = {round(share * steps): reached for share, reached in REFINED.items()}

    def __call__(self, x: Tensor, sigma: float, t: float, context: Tensor, i: int) -> Tensor:
        """The samplers' x (B, 4, h, w) at step i, moved; context (B, T, D) is the prompts' alone."""
        if i >= self.steps // 2:
            return x
        alpha = self.scale * math.sqrt(1 - 0.5 * i / self.steps)
        with torch.inference_mode(False), torch.enable_grad():
            x, context = x.clone(), context.clone()
            x, reached = self.move(x, sigma, t, context, i, alpha)
            for _ in range(MOST_REFINEMENTS if i in self.targets and self.scale else 0):
                low = reached < self.targets[i]
                if not low.any():
                    break
                moved, reached = self.move(x, sigma, t, context, i, alpha)
                x = torch.where(low[:, None, None, None], moved, x)
        return x

    def move(self, x: Tensor, sigma: float, t: float, context: Tensor, i: int, alpha: float):
        """One step down the loss: x, and the attention to the least attended word of each picture (B,)."""
        scale = (sigma**2 + 1) ** 0.5
        x_t = (x / scale).detach().requires_grad_(True)
        maps: list[Tensor] = []
        with recorded(self.sd.unet, maps):
            self.sd.unet(x_t, torch.full((1,), t, device=x.device), context)
        nearest = min({m.shape[1] for m in maps}, key=lambda n: abs(math.log(n / POSITIONS)))
        attention = torch.stack([m for m in maps if m.shape[1] == nearest]).mean(0)  # (B, N, T)
        least = [least_attended(a, places) for a, places in zip(attention, self.places[i], strict=True)]
        reached = torch.stack(least)
        (gradient,) = torch.autograd.grad((1 - reached).sum(), x_t)
        return (x - alpha * scale * gradient).detach(), reached.detach()


def word_places(text, prompt: str, words: list[str]) -> dict[str, list[int]]:
    """Word -> its positions in the context of a prompt, at its first place; only words that are there."""
    chunks, out = [ids for ids, _ in text.chunks(prompt)], {}
    for word in words:
        own = text.chunks(word)[0][0]
        for k, ids in enumerate(chunks):
            starts = [j for j in range(len(ids) - len(own) + 1) if ids[j : j + len(own)] == own]
            if starts and word not in out:
                out[word] = [text.length * k + 1 + j for j in range(starts[0], starts[0] + len(own))]
    return out


def least_attended(attention: Tensor, places: dict[str, list[int]]) -> Tensor:
    """The largest attention that the least attended word finds anywhere, of (N, T); 1 without a word."""
    words = torch.softmax(100 * attention[:, 1:-1], -1)  # without the begin token, which draws most of it
    side, peaks = math.isqrt(len(attention)), []
    for positions in places.values():
        smooth = words[:, [p - 1 for p in positions]].mean(-1)
        if side * side == len(attention):
            smooth = gaussian(smooth.view(1, 1, side, side))
        peaks.append(smooth.max())
    return torch.stack(peaks).min() if peaks else attention.sum() * 0 + 1


def gaussian(a: Tensor) -> Tensor:
    """3x3 smoothing with sigma 0.5, (1, 1, h, w)."""
    g = torch.exp(-torch.tensor([1.0, 0.0, 1.0], device=a.device) / (2 * 0.5**2))
    kernel = torch.outer(g, g) / g.sum() ** 2
    return F.conv2d(F.pad(a, (1, 1, 1, 1), "reflect"), kernel[None, None].to(a.dtype))


def recorded(unet: nn.Module, maps: list[Tensor]) -> AbstractContextManager[None]:
    """Inside, every cross-attention is the plain equation, and its probabilities (B, N, T) go to `maps`."""
    layers = cross_attentions(unet)
    return replaced_forwards([(attn, functools.partial(_plain_attention, attn, maps)) for attn in layers])


def _plain_attention(attn: nn.Module, maps: list[Tensor], x: Tensor, context: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v, in fp32."""
    q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
    q, k, v = (attn.split_heads(a).float() for a in (q, k, v))
    probabilities = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)  # (B, heads, N, T)
    maps.append(probabilities.mean(1))
    return attn.to_out[0]((probabilities @ v).transpose(1, 2).flatten(2).to(x.dtype))
