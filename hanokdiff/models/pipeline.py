"""Stable Diffusion in one object: text encoder, UNet, autoencoder and schedule.

    sd = load("tiny")                                            # or a folder, a single file, a hub id
    for x in sd.sample(["a castle in the snow"], seeds=[0]): ...
    sd.pictures(x)[0].save("castle.png")

This is the only place that chooses the device and the precision.
"""

import ctypes
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hanokdiff.formats import folder as checkpoint
from hanokdiff.formats import single_file as singlefile
from hanokdiff.models import samplers
from hanokdiff.models.memory import put
from hanokdiff.models.schedule import Schedule
from hanokdiff.models.tokens import Text, TextConfig, TextEncoder
from hanokdiff.models.unet import UNet, UNetConfig
from hanokdiff.models.vae import VAE, VAEConfig
from hanokdiff.training import distributed as several
from hanokdiff.training.dataset import to_tensor

TINY = Path(__file__).parents[1] / "tiny" / "sd"
LARGEST = 8192  # pixels of a side: what is asked for beyond is a slip of the finger
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose(device: str | None = None, dtype: str = "auto") -> tuple[torch.device, torch.dtype, str]:
    """The device and the precision of everything that is frozen, and the reason in words."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f'dtype "{dtype}" is not known; choose one of auto, {", ".join(DTYPES)}')
    why = "named" if device else ("the first GPU" if torch.cuda.is_available() else "no CUDA device here")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and several.COUNT > 1:
        device, why = f"cuda:{several.LOCAL}", "each process has its own"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f'device "{device}" cannot be used ({reason}); try cpu, or leave it out') from None
    if chosen.type == "cpu" and sys.platform == "linux":
        keep_memory()
    if chosen.type == "cuda" and several.COUNT > 1:
        torch.cuda.set_device(chosen)
    if dtype != "auto":
        return chosen, DTYPES[dtype], f"{chosen} ({why}), {dtype} (named)"
    if chosen.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return chosen, torch.bfloat16, f"{chosen} ({why}), bf16 (fp32's range at half the memory)"
        return chosen, torch.float32, f"{chosen} ({why}), fp32 (this card has no bf16)"
    return chosen, torch.float32, f"{chosen} ({why}), fp32 (fastest and exact there)"


def keep_memory() -> None:
    """Ask glibc to keep freed memory: by default every training step gives it back and fetches it anew, up to a third
    of the time on a CPU."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library: only slower
        pass


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
        both = self.unet.read((context if negative is None else torch.cat([negative, context])).to(self.dtype))

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
        self, prompts: list[str], seeds: list[int], negative: str = "", sampler: str = samplers.DEFAULT,
        steps: int = 20, cfg: float | None = None, size: tuple[int, int] | None = None,
        first: Tensor | None = None, strength: float = 1.0,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yield the latents (B, 4, h, w) after every step; picture i starts from the noise of seeds[i] alone.

        `size` is (width, height) in pixels, both divisible by 8 (4 in the tiny world); default the model's own.
        `first` (1, 4, h, w), from `latents`, is a picture to begin with: the smaller `strength`, the more stays."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds: each picture has one of both")
        cfg = self.cfg if cfg is None else cfg
        w, h = check_size(size or (self.resolution, self.resolution), self.vae.config.factor)
        shape = (self.unet.config.in_channels, h, w)
        streams = [torch.Generator().manual_seed(s) for s in seeds]  # on the CPU: the same noise on every device

        def noise() -> Tensor:
            return put(torch.stack([torch.randn(shape, generator=g) for g in streams]), self.device)

        with torch.inference_mode():
            both = self.text.prompts([*prompts, negative] if cfg != 1 else prompts)     # (B or B + 1, 77 k, D)
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

    def draw(self, prompts: list[str], seeds: list[int], batch_size: int = 32, **options) -> list[Image.Image]:
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


def grid(pictures: list[Image.Image], columns: int, zoom: int = 1, gap: int = 2) -> Image.Image:
    """Pictures of one size in rows of `columns`, on white."""
    w, h = (zoom * n for n in pictures[0].size)
    rows = -(-len(pictures) // columns)
    out = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, p in enumerate(pictures):
        p = p.resize((w, h), Image.Resampling.NEAREST) if zoom > 1 else p
        out.paste(p, (i % columns * (w + gap), i // columns * (h + gap)))
    return out


def check_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Pixels -> latent positions, (width, height)."""
    for n, side in zip(size, ("width", "height"), strict=True):
        if n > LARGEST:
            raise ValueError(f"{side} is {n}, but must be at most {LARGEST}")
        if n < factor or n % factor:
            near = max(factor, round(n / factor) * factor)
            raise ValueError(f"{side} is {n}, but must be divisible by {factor}; the nearest is {near}")
    return size[0] // factor, size[1] // factor


def load(
    model: str = "tiny", device: str | None = None, dtype: str = "auto", say=print, tokenizer: str | None = None,
    prediction: str | None = None, masters: bool = False,
) -> StableDiffusion:  # fmt: skip
    """Open a model: "tiny", a diffusers folder, a hub id, or a single file (.safetensors, .ckpt). Everything is
    frozen; what learns is up to the method.

    tokenizer    folder or hub id of another tokenizer than the model's own
    prediction   "epsilon" or "v_prediction": what the UNet predicts, where the model is silent or wrong about it
    masters      keep what the file says as `master` of each parameter: to learn from it and to save it again, not from
                 what half precision leaves of it"""
    start, (dev, precision, reason) = time.perf_counter(), choose(device, dtype)
    path = TINY if model == "tiny" else checkpoint.find(model)
    open_ = open_file if path.is_file() else open_folder
    unet, vae, encoder, words, schedule = open_(path, tokenizer, prediction, say)
    for part in (unet, vae, encoder):
        exact = [p.detach() for p in part.parameters()]
        part.to(dev, precision)
        if masters and precision != torch.float32:
            for p, full in zip(part.parameters(), exact, strict=True):
                p.master = full
    if say:
        millions = sum(p.numel() for p in unet.parameters()) / 1e6
        say(f"model {model}: UNet of {millions:.1f} M parameters, {schedule.prediction_type}, "
            f"opened in {time.perf_counter() - start:.1f} s")  # fmt: skip
        say(f"device {reason}")
    sd = StableDiffusion(unet, vae, Text(encoder, words), schedule, dev, precision, model)
    if (path / "hanokdiff.json").is_file():  # our DreamBooth's: the word it was trained with
        word = checkpoint.read_json(path / "hanokdiff.json").get("token")
        if not isinstance(word, str):
            raise ValueError(f'{path / "hanokdiff.json"} names no pseudo word; write {{"token": "..."}} into it')
        try:
            sd.text.add_word(word)
        except ValueError as e:
            raise ValueError(f"{path / 'hanokdiff.json'}: {e}") from None
    return sd


def open_folder(folder: Path, tokenizer: str | None, prediction: str | None, say) -> tuple:
    """UNet, VAE, text encoder, tokenizer and schedule of a diffusers folder."""
    checkpoint.check_kind(folder)
    schedule = folder / "scheduler" / "scheduler_config.json"
    schedule = checkpoint.read_config(schedule, Schedule, "a noise schedule that is known here")
    schedule = replace(schedule, prediction_type=prediction or schedule.prediction_type)
    unet = checkpoint.load_part(folder, "unet", UNet, UNetConfig)
    vae = checkpoint.load_part(folder, "vae", VAE, VAEConfig)
    encoder = checkpoint.load_part(folder, "text_encoder", TextEncoder, TextConfig)
    checkpoint.check_fit(unet.config, encoder.config, folder)
    own, size = folder / "tokenizer", encoder.config.vocab_size
    words = find_tokenizer(encoder.config, tokenizer, folder) if tokenizer else \
        checkpoint.check_tokenizer(checkpoint.load_tokenizer(own), own, size)  # fmt: skip
    return unet, vae, encoder, words, schedule


def open_file(path: Path, tokenizer: str | None, prediction: str | None, say) -> tuple:
    """The same five of a single file; the tokenizer is found elsewhere."""
    unet, vae, encoder, schedule = singlefile.read(path, prediction, say)
    return unet, vae, encoder, find_tokenizer(encoder.config, tokenizer, path.parent), schedule


def find_tokenizer(c: TextConfig, named: str | None, beside: Path):
    return checkpoint.find_tokenizer(named, beside, c.vocab_size, singlefile.is_sd2(c))
