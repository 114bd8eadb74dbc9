"""Stable Diffusion in one object: text encoder, UNet, autoencoder and schedule.

    sd = load("tiny")                                            # or a folder, a single file, a hub id
    for x in sd.sample(["a castle in the snow"], seeds=[0]): ...
    sd.pictures(x)[0].save("castle.png")

This is the only place that chooses the device and the precision.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hanokdiff.images import grid
from hanokdiff.models import memory, samplers
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

    def denoiser(self, context: Tensor, negative: Tensor | None, cfg: float) -> samplers.Denoise:
        """The network as a sampler wants it: (x, sigma, t) -> clean picture, guided and in x's own scale.

        Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): out = un + cfg (cond - un), both in one call;
        `negative` (B, T, D) is the context to move away from, None switches guidance off."""
        both = self.unet.read(
            (context if negative is None else torch.cat([negative, context])).to(self.dtype)
        )

        def denoise(x: Tensor, sigma: float, t: float) -> Tensor:
            c_in = (sigma**2 + 1) ** -0.5
            out = self.unet((x * c_in).to(self.dtype), torch.full((1,), t, device=x.device), both).float()
            if negative is not None:
                un, cond = out.chunk(2)
                out = un + cfg * (cond - un)
            if self.schedule.prediction_type == "v_prediction":
                return x * c_in**2 - out * sigma * c_in
            return x - sigma * out

        return denoise

    def sample(
        self,
        prompts: list[str],
        seeds: list[int],
        negative: str = "",
        sampler: str = samplers.DEFAULT,
        steps: int = 20,
        cfg: float | None = None,
        size: tuple[int, int] | None = None,
        first: Tensor | None = None,
        strength: float = 1.0,
    ) -> Iterator[Tensor]:
        """Yield the latents (B, 4, h, w) after every step; picture i starts from the noise of seeds[i] alone.

        `size` is (width, height) in pixels, both divisible by 8 (4 in the tiny world); default the model's own.
        `first` (1, 4, h, w), from `latents`, is a picture to begin with: the smaller `strength`, the more stays."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds: each picture has one of both")
        cfg = self.cfg if cfg is None else cfg
        w, h = latent_size(size or (self.resolution, self.resolution), self.vae.config.factor)
        shape = (self.unet.config.in_channels, h, w)
        streams = [
            torch.Generator().manual_seed(s) for s in seeds
        ]  # on the CPU: the same noise on every device

        def noise() -> Tensor:
            return memory.to_device(
                torch.stack([torch.randn(shape, generator=g) for g in streams]), self.device
            )

        with torch.inference_mode():
            both = self.text.prompts([*prompts, negative] if cfg != 1 else prompts)  # (B or B + 1, 77 k, D)
            context = both[: len(prompts)]
            away = both[-1:].expand_as(context) if cfg != 1 else None
            denoise = self.denoiser(context, away, cfg)
            walk = samplers.sample(sampler, denoise, noise, self.schedule, steps, first, strength)
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
        """Places of prompts in batches of one length in chunks: filled up, a prompt would draw another picture."""
        lengths = [len(self.text.chunks(p)) for p in prompts]
        for length in sorted(set(lengths)):
            places = [i for i, n in enumerate(lengths) if n == length]
            yield from (places[k : k + size] for k in range(0, len(places), size))

    def preview(self, word: str, side: int) -> Image.Image:
        """What training shows along the way, at the side in pixels that it trains at: the word, and whether it still
        goes with others."""
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
