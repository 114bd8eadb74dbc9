"""Stable Diffusion in one object: text encoder, UNet, autoencoder and schedule.

sd = load_model("tiny")    # hanokdiff.formats.load; or a folder, a single file, a hub id
for x in sd.sample(["a castle in the snow"], seeds=[0]): ...
sd.pictures(x)[0].save("castle.png")
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hanokdiff.device import to_device
from hanokdiff.images import labelled_sheet
from hanokdiff.models import samplers
from hanokdiff.models.attend import SCALE, Attend
from hanokdiff.models.memory import given_kv, project_kv, shared_prefix
from hanokdiff.models.prompt_schedule import at_steps, resolve
from hanokdiff.models.schedule import Schedule
from hanokdiff.models.tokens import Text
from hanokdiff.models.unet import UNet
from hanokdiff.models.vae import VAE

LARGEST_SIDE = 8192  # pixels of a side: what is asked for beyond is a slip of the finger


@dataclass
class StableDiffusion:
    unet: UNet
    vae: VAE
    text: Text
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype
    name: str = ""
    digest: str = ""  # of its weights, tokenizer and schedule as they were opened: formats/load.py

    @property
    def cfg(self) -> float:
        """The guidance that suits the model: what the tiny world likes is too little for Stable Diffusion."""
        return 4.0 if self.resolution <= 64 else 7.5

    @property
    def resolution(self) -> int:
        """Pixels per side that the model was trained at."""
        return self.unet.config.sample_size * self.vae.config.factor

    def contexts(self, prompts: list[str], negative: str, steps: int, cfg: float) -> tuple[list, Tensor]:
        """The contexts of each step, for B prompts of K parts (1 without AND): each ((1 + K) B, 77 k, D), B
        rows of the negative prompt and B of each part, equal ones the same tensor; and the weights
        (K, B, 1, 1, 1). Without guidance (cfg 1, one part) the rows are the prompts' alone."""
        readings = [at_steps(p, steps) for p in prompts]
        weights = torch.tensor([[w for _, w in reading[0]] for reading in readings]).T
        guided = cfg != 1 or bool((weights != 1).any()) or len(weights) > 1
        out, known = [], {}
        for i in range(steps):
            rows = [reading[i][k][0] for k in range(len(weights)) for reading in readings]
            if guided:
                rows = [resolve(negative, i + 1, steps)] * len(prompts) + rows
            if tuple(rows) not in known:
                distinct = list(dict.fromkeys(rows))  # read once
                z = self.text.prompts(distinct)
                known[tuple(rows)] = z[to_device(torch.tensor([distinct.index(r) for r in rows]), z.device)]
            out.append(known[tuple(rows)])
        return out, to_device(weights[..., None, None, None], self.device)

    def noise(self, seeds: list[int], size: tuple[int, int]) -> samplers.Noise:
        """A function that returns new noise (B, 4, h, w) at each call, row i from a generator of seeds[i]
        alone: on the CPU, so that a seed gives one picture anywhere. `size` (width, height) in pixels."""
        w, h = latent_size(size, self.vae.config.factor)
        shape = (self.unet.config.in_channels, h, w)
        own = [torch.Generator().manual_seed(s) for s in seeds]
        return lambda: to_device(torch.stack([torch.randn(shape, generator=g) for g in own]), self.device)

    def guided(self, x: Tensor, sigma: float, t: float, context: Tensor, cfg: float, weights=1.0) -> Tensor:
        """The UNet's prediction (B, 4, h, w) for samplers' x at noise level sigma, timestep t.

        Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, equation 6), of several parts the sum
        (Liu et al. 2022, arXiv:2206.01714, equation 11): context and weights are `contexts`'; all rows go
        through the network at once."""
        rows = len(context) // len(x)
        x_t = (x * (sigma**2 + 1) ** -0.5).repeat(rows, 1, 1, 1)
        pred = self.unet(x_t, torch.full((1,), t, device=x.device), context)
        if rows == 1:
            return pred
        uncond, *conds = pred.chunk(rows)
        return uncond + cfg * (weights * (torch.stack(conds) - uncond)).sum(0)

    def sample(
        self,
        prompts: list[str],
        seeds: list[int],
        negative: str = "",
        sampler: str = samplers.DEFAULT,
        steps: int = 20,
        cfg: float | None = None,
        size: tuple[int, int] | None = None,  # (width, height) in pixels; default: the model's own
        init_latents: Tensor | None = None,  # (1, 4, h, w) of a picture, from `latents`
        strength: float = 1.0,  # the smaller, the more of that picture stays
        attend: tuple[str, ...] = (),  # words for Attend-and-Excite
        attend_scale: float = SCALE,
    ) -> Iterator[Tensor]:
        """Yield the latents (B, 4, h, w) after every step: sample.py's loop, for previews and compare."""
        check_seeds(prompts, seeds)
        cfg = self.cfg if cfg is None else cfg
        noise = self.noise(seeds, size or (self.resolution, self.resolution))
        strength = None if init_latents is None else strength
        step, plan, start = samplers.plan(sampler, self.schedule, steps, strength)
        excite = Attend(self, prompts, list(attend), len(plan), attend_scale) if attend else None
        with torch.inference_mode():
            contexts, weights = self.contexts(prompts, negative, len(plan), cfg)
            x, previous, last = noise() * start, None, None
            if init_latents is not None:
                x = init_latents + x
        for i, (sigma, after, t) in enumerate(plan):
            with torch.inference_mode():  # for our steps, not for the caller's code between them
                context = contexts[i]
                if excite:
                    x = excite(x, sigma, t, context[-len(x) :], i)
                if context is not last:  # at the first step, and where the prompt changes
                    kv, last = project_kv(self.unet, context), context
                with given_kv(kv), shared_prefix(self.unet, len(context) // len(x)):
                    pred = self.guided(x, sigma, t, context, cfg, weights)
                x0 = self.schedule.predict_x0(x, pred, sigma)
                x = step(x, x0, sigma, after, previous, noise)
                previous, latents = (x0, sigma), x / math.sqrt(after**2 + 1)
            yield latents

    def draw(self, prompts: list[str], seeds, batch_size: int = 32, **options) -> list[Image.Image]:
        """One finished picture per prompt and seed; `options` are those of `sample`."""
        check_seeds(prompts, seeds)
        out = {}
        for part in self.batches(prompts, batch_size, options.get("steps", 20)):
            for x in self.sample([prompts[i] for i in part], [seeds[i] for i in part], **options):
                pass
            out |= zip(part, self.pictures(x), strict=True)
        return [out[i] for i in range(len(prompts))]

    def batches(self, prompts: list[str], size: int, steps: int = 20) -> Iterator[list[int]]:
        """Places of prompts in batches of one length in chunks, at every step and in every part: unfilled."""
        chunks = functools.cache(lambda text: len(self.text.chunks(text)))
        lengths = [tuple(tuple(chunks(t) for t, _ in parts) for parts in at_steps(p, steps)) for p in prompts]
        for length in sorted(set(lengths)):
            places = [i for i, n in enumerate(lengths) if n == length]
            yield from (places[k : k + size] for k in range(0, len(places), size))

    def preview(self, word: str, size: tuple[int, int]) -> Image.Image:
        """What training shows along the way, at its size in pixels: the word, alone and with others."""
        prompts = [word, f"{word} in the snow", f"{word} at night", f"{word} with trees"]
        return labelled_sheet([self.draw(prompts, range(4), size=size)], [""], prompts)

    @torch.inference_mode()
    def latents(self, picture: Image.Image) -> Tensor:
        """An RGB picture -> the mean of its latents (1, 4, h, w) float32."""
        pixels = to_device(to_tensor(picture)[None], self.device).to(self.dtype)
        return self.vae.encode(pixels)[0].float()

    def pictures(self, latents: Tensor, slice: int = 8) -> list[Image.Image]:
        """Decode latents (B, 4, h, w), a few at a time, to 8-bit pictures; rounded, not truncated. What is
        not a number would be a black picture: it is refused. Where half precision overflows in the decoder,
        as in some autoencoders of SD 1 and 2 (webui#7633), those pictures are decoded again in fp32."""
        out = []
        with torch.inference_mode():
            for part in latents.split(slice):
                if not torch.isfinite(part).all():
                    black = f"what {self.name} drew is not a number, which would be a black picture"
                    way = "draw with a smaller strength of what was applied to it, with --dtype fp32"
                    raise ValueError(f"{black}; {way}, or with another file")
                x = self.vae.decode(part.to(self.dtype)).float()
                if not torch.isfinite(x).all():
                    x = self._decode_in_fp32(part)
                x = ((x.cpu() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
                out += [Image.fromarray(np.ascontiguousarray(p)) for p in x.permute(0, 2, 3, 1).numpy()]
        return out

    def _decode_in_fp32(self, latents: Tensor) -> Tensor:
        self.vae.float()
        try:
            x = self.vae.decode(latents.float())
        finally:
            self.vae.to(self.dtype)
        if not torch.isfinite(x).all():
            none = f"the autoencoder of {self.name} makes no picture of this, in fp32 either"
            raise ValueError(f"{none}: take another one")
        return x


def check_seeds(prompts: list[str], seeds) -> None:
    if len(prompts) != len(seeds):
        both = f"{len(prompts)} prompts for {len(seeds)} seeds"
        raise ValueError(f"{both}: give as many of one as of the other")


def latent_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Pixels -> latent positions, (width, height)."""
    for n, side in zip(size, ("width", "height"), strict=True):
        if n > LARGEST_SIDE:
            raise ValueError(f"{side} is {n}, but must be at most {LARGEST_SIDE}")
        if n < factor or n % factor:
            near = max(factor, round(n / factor) * factor)
            raise ValueError(f"{side} is {n}, but must be divisible by {factor}; the nearest is {near}")
    return size[0] // factor, size[1] // factor


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
