"""The sizes that are measured, and each method's model, data, trainable parameters and loss."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hanokdiff.device import DTYPES
from hanokdiff.formats.load import TINY_MODEL, load_model
from hanokdiff.formats.tokenizer import load_tokenizer
from hanokdiff.methods import dreambooth, hypernetwork, lora, textual_inversion
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.models.schedule import Schedule
from hanokdiff.models.text_encoder import TextConfig, TextEncoder
from hanokdiff.models.tokens import Text
from hanokdiff.models.unet import UNet, UNetConfig
from hanokdiff.models.vae import VAE, VAEConfig
from hanokdiff.training.dataset import LatentDataset
from hanokdiff.training.noise import Batch
from hanokdiff.training.validation import denoising_losses

TRAINED = ("ti", "dreambooth", "lora", "hypernet", "hypernet-all")
PEERS = ("ti", "dreambooth", "lora")  # those that diffusers has a script for
RECIPES = ("lora-text", "pivotal", "custom-diffusion", "svdiff")  # ours alone, beside no peer
SAMPLED = {  # ours alone: a prompt, and the words of Attend-and-Excite
    "sample-edit": ("[a house:a barn:0.3] in the snow", ()),
    "sample-alternate": ("[a house|a barn] in the snow", ()),
    "sample-and": ("a house AND snow :0.7", ()),
    "sample-attend": ("a house in the snow", ("house", "snow")),
}
WORKS = (*TRAINED, *RECIPES, "sample", *SAMPLED, "start")
STEPS = 20  # sampling steps of one picture


@dataclass(frozen=True)
class Size:
    """The configuration of a model, the side of its pictures in pixels, and the usual batch size."""

    unet: UNetConfig
    text: TextConfig
    vae: VAEConfig
    side: int
    batch: int


_NARROW = dict(cross_attention_dim=64, sample_size=16)
_TEXT = TextConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
_VAE = VAEConfig(block_out_channels=(32, 32, 64, 64), sample_size=128)
SIZES = {
    # all of SD 1.5's layers, so narrow that what is left is the cost of calling them
    "overhead": Size(UNetConfig(block_out_channels=(32, 32, 32, 32), **_NARROW), _TEXT, _VAE, 128, 2),
    "small": Size(UNetConfig(block_out_channels=(64, 128, 128), attention=(True, True, True), heads=(8, 8, 8),
                             **_NARROW), _TEXT, _VAE, 128, 8),
    "half": Size(UNetConfig(block_out_channels=(160, 320, 640, 640), cross_attention_dim=64),
                 _TEXT, _VAE, 256, 1),
    "sd15": Size(UNetConfig(), TextConfig(), VAEConfig(), 512, 8),
}  # fmt: skip


def side(size: str) -> int:
    """The side of this size's pictures in pixels."""
    return 64 if size == "tiny" else SIZES[size].side


def batch(size: str) -> int:
    """Pictures per step, unless --batch-size says otherwise."""
    return 8 if size == "tiny" else SIZES[size].batch


def parameters(size: str) -> int:
    """Numbers in the UNet of this size, by which --dtype auto chooses on a CPU."""
    with torch.device("meta"):
        return 0 if size == "tiny" else sum(p.numel() for p in UNet(SIZES[size].unet).parameters())


def build(size: str, device: str, dtype: torch.dtype) -> StableDiffusion:
    """A model of this size with random weights, made on the device; "tiny" is the embedded one."""
    if size == "tiny":
        return load_model("tiny", device, {v: k for k, v in DTYPES.items()}[dtype], log=None)
    config = SIZES[size]
    torch.manual_seed(0)
    with torch.device(device):
        parts = UNet(config.unet), VAE(config.vae), TextEncoder(config.text)
    unet, vae, encoder = (part.to(dtype).requires_grad_(False) for part in parts)
    text = Text(encoder, load_tokenizer(TINY_MODEL / "tokenizer"))
    return StableDiffusion(unet, vae, text, Schedule(), torch.device(device), dtype, size)


def photos(side: int, n: int = 8) -> tuple[list[Image.Image], list[str]]:
    """n images of noise, side x side pixels, the same at every call, and their captions."""
    noise = np.random.default_rng(0).integers(256, size=(n, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise], [f"* {i} in the snow" for i in range(n)]


def trained(sd: StableDiffusion, method: str) -> dict:
    """What a method trains, name -> parameter, as in train_METHOD.py; LoRAs of rank 4, as diffusers' are."""
    if method == "lora":
        return lora.trainable(lora.insert(sd, 4, 4))
    if method == "lora-text":
        return lora.trainable(lora.insert(sd, 4, 4, text_rank=4))
    if method == "pivotal":
        word = textual_inversion.insert(sd, "*", textual_inversion.token_embedding(sd)[[400] * 4])
        return lora.trainable(lora.insert(sd, 4, 4, text_rank=4)) | textual_inversion.trainable(word)
    if method.startswith("hypernet"):
        dims = hypernetwork.dims(sd)["all" if method == "hypernet-all" else "context"]
        hypernet = hypernetwork.Hypernetwork(hypernetwork.HypernetConfig(), dims)
        return hypernetwork.trainable(hypernetwork.insert(sd, hypernet))
    ids = [400] if method == "ti" else sd.text.words["*"]
    embedding = textual_inversion.insert(sd, "*", textual_inversion.token_embedding(sd)[ids])
    if method == "ti":
        return textual_inversion.trainable(embedding)
    train = {"custom-diffusion": "cross-attention", "svdiff": "singular-values"}.get(method, "all")
    return dreambooth.prepare(sd, embedding, train).parameters


def prepare(sd: StableDiffusion, method: str, side: int) -> tuple[dict, Callable[[Batch], Tensor]]:
    """What a method trains, and a function that returns the losses of a batch (B,)."""
    images, captions = photos(side)
    sd.text.add_word("*")
    trainable = trained(sd, method)
    for p in trainable.values():
        p.requires_grad_(True)
    dataset = LatentDataset(sd.vae, images, captions, device=sd.device)
    if method in ("lora", "hypernet", "hypernet-all"):
        sd.text.cache_prompts(captions)
    return trainable, functools.partial(denoising_losses, sd, dataset)
