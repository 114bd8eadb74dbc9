"""Stable Diffusion in one object: text encoder, UNet, autoencoder and schedule.

sd = load_model("tiny")    # hanokdiff.formats.load; or a folder, a single file, a hub id
for x in sd.sample(["a castle in the snow"], seeds=[0]): ...
sd.pictures(x)[0].save("castle.png")
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hanokdiff.images import grid
from hanokdiff.models import samplers
from hanokdiff.models.memory import given_kv, project_kv, to_device
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

    @property
    def cfg(self) -> float:
        """The guidance that suits the model: what the tiny world likes is too little for Stable Diffusion."""
        return 4.0 if self.resolution <= 64 else 7.5

    @property
    def resolution(self) -> int:
        """Pixels per side that the model was trained at."""
        return self.unet.config.sample_size * self.vae.config.factor

    def encode(self, prompts: list[str], negative: str | None) -> Tensor:
        """The context of prompts (B, 77 k, D); with a negative prompt, of both (2B, 77 k, D), its rows
        first."""
        if negative is None:
            return self.text.prompts(prompts)
        both = self.text.prompts([*prompts, negative])
        return torch.cat([both[-1:].expand_as(both[:-1]), both[:-1]])

    def noise(self, seeds: list[int], size: tuple[int, int]) -> samplers.Noise:
        """A function that returns new noise (B, 4, h, w) at each call, row i from a generator of seeds[i]
        alone: on the CPU, so that a seed gives the same picture in any batch and on any device. `size`
        (width, height) in pixels."""
        w, h = latent_size(size, self.vae.config.factor)
        shape = (self.unet.config.in_channels, h, w)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return lambda: to_device(
            torch.stack([torch.randn(shape, generator=g) for g in generators]), self.device
        )

    def guided(self, x: Tensor, sigma: float, t: float, context: Tensor, cfg: float) -> Tensor:
        """The UNet's prediction (B, 4, h, w) for samplers' x at noise level sigma, timestep t.

        Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, equation 6): context holds the rows of
        the negative prompt, then those of the prompts; both go through the network at once. cfg 1 is none: B
        rows."""
        x_t = x * (sigma**2 + 1) ** -0.5
        t = torch.full((1,), t, device=x.device)
        if cfg == 1:
            return self.unet(x_t, t, context)
        uncond, cond = self.unet(torch.cat([x_t, x_t]), t, context).chunk(2)
        return uncond + cfg * (cond - uncond)

    def sample(
        self,
        prompts: list[str],
        seeds: list[int],
        negative: str = "",
        sampler: str = samplers.DEFAULT,
        steps: int = 20,
        cfg: float | None = None,
        size: tuple[int, int] | None = None,
        init_latents: Tensor | None = None,
        strength: float = 1.0,
    ) -> Iterator[Tensor]:
        """Yield the latents (B, 4, h, w) after every step: sample.py's loop, for previews, class pictures and
        compare.

        `size` is (width, height) in pixels, both divisible by 8 (4 in the tiny world); default the model's
        own. `init_latents` (1, 4, h, w), from `latents`, are a picture's: the smaller `strength`, the more of
        it stays."""
        if len(prompts) != len(seeds):
            raise ValueError(
                f"{len(prompts)} prompts for {len(seeds)} seeds: give as many of one as of the other"
            )
        cfg = self.cfg if cfg is None else cfg
        noise = self.noise(seeds, size or (self.resolution, self.resolution))
        plan = samplers.plan(sampler, self.schedule, steps, None if init_latents is None else strength)
        with torch.inference_mode():
            context = self.encode(prompts, None if cfg == 1 else negative)
            kv = project_kv(self.unet, context)

        def denoise(x: Tensor, sigma: float, t: float) -> Tensor:
            with given_kv(kv):
                pred = self.guided(x, sigma, t, context, cfg)
            return self.schedule.predict_x0(x, pred, sigma)

        walk = samplers.sample(plan, denoise, noise, init_latents)
        while True:  # inference mode for our steps, not for the caller's code between them
            with torch.inference_mode():
                x = next(walk, None)
            if x is None:
                return
            yield x

    def draw(
        self, prompts: list[str], seeds: list[int], batch_size: int = 32, **options
    ) -> list[Image.Image]:
        """One finished picture per prompt and seed; `options` are those of `sample`."""
        out = {}
        for part in self.batches(prompts, batch_size):
            for x in self.sample([prompts[i] for i in part], [seeds[i] for i in part], **options):
                pass
            out |= zip(part, self.pictures(x), strict=True)
        return [out[i] for i in range(len(prompts))]

    def batches(self, prompts: list[str], size: int) -> Iterator[list[int]]:
        """Places of prompts in batches of one length in chunks: filled up, a prompt would draw another
        picture."""
        lengths = [len(self.text.chunks(p)) for p in prompts]
        for length in sorted(set(lengths)):
            places = [i for i, n in enumerate(lengths) if n == length]
            yield from (places[k : k + size] for k in range(0, len(places), size))

    def preview(self, word: str, side: int) -> Image.Image:
        """What training shows along the way, at the side in pixels that it trains at: the word, and whether
        it still goes with others."""
        prompts = [word, f"{word} in the snow", f"{word} at night", f"{word} with trees"]
        return grid(self.draw(prompts, range(4), size=(side, side)), 4)

    @torch.inference_mode()
    def latents(self, picture: Image.Image) -> Tensor:
        """An RGB picture -> the mean of its latents (1, 4, h, w) float32."""
        return self.vae.encode(to_tensor(picture)[None].to(self.device, self.dtype))[0].float()

    def pictures(self, latents: Tensor, slice: int = 8) -> list[Image.Image]:
        """Decode latents (B, 4, h, w), a few at a time, to 8-bit pictures; rounded, not truncated."""
        out = []
        with torch.inference_mode():
            for part in latents.split(slice):
                x = self.vae.decode(part.to(self.dtype)).float().cpu()
                x = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte()
                out += [Image.fromarray(np.ascontiguousarray(p)) for p in x.permute(0, 2, 3, 1).numpy()]
        return out


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
