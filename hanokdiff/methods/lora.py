"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, equation 3).

    y = W x + scale * up(down(x)),     scale = alpha / rank,     down: in -> rank,  up: rank -> out

W is frozen; `up` starts at zero, so step 0 is exactly the base model.  The file format is kohya's: every tool reads it.
Other tools' files are read too, whatever they call the tensors (lorafile.py), and diffusers' layout can be written.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanokdiff.methods.inject import base_layer
from hanokdiff.seeding import seeded_generator

# What each choice of --targets adds, by the end of the module's name in the UNet.
TARGETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "ff": ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    "conv": ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
}
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class LoRA(nn.Module):
    """A Linear or Conv2d (or a LoRA around one) with a low-rank side path. `strength` scales the side path."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, strength: float = 1.0):
        super().__init__()
        self.base, self.rank, self.alpha, self.strength = base, rank, alpha, strength
        w = base_layer(base).weight
        self.down = nn.Parameter(torch.empty(rank, *w.shape[1:], device=w.device))
        self.up = nn.Parameter(torch.zeros(w.shape[0], rank, *[1] * (w.dim() - 2), device=w.device))

    def forward(self, x: Tensor) -> Tensor:
        y, scale = self.base(x), self.strength * self.alpha / self.rank
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if down.dim() == 2:  # scaled and added inside the product: no operation more for it
            return torch.addmm(
                y.flatten(0, -2), F.linear(x, down).flatten(0, -2), up.t(), alpha=scale
            ).view_as(y)
        conv = base_layer(self.base)
        return y + F.conv2d(F.conv2d(x, down, None, conv.stride, conv.padding), up * scale)

    def delta(self) -> Tensor:
        """What this adds to the weight, in fp32 and in its shape."""
        w = base_layer(self.base).weight
        up_down = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return (self.strength * self.alpha / self.rank) * up_down.view(w.shape)


def parent_of(network: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Where the layer at a path (or the LoRA around it) hangs: a hypernetwork that stands before it stays outside."""
    parent, _, name = path.rpartition(".")
    parent = network.get_submodule(parent)
    while not isinstance(getattr(parent, name), LoRA | nn.Linear | nn.Conv2d):
        parent, name = getattr(parent, name), "base"
    return parent, name


def layers(sd) -> dict[str, tuple[nn.Module, str]]:
    """kohya name -> (network, path) of every Linear and Conv2d of UNet and text encoder, wrapped or not."""
    out = {}
    for prefix, network in (("lora_unet_", sd.unet), ("lora_te_text_model_", sd.text.encoder)):
        for path, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                path = path.split(".base")[0]  # inside LoRAs already there
                out[prefix + path.replace(".", "_")] = (network, path)
    return out


def wrap(network: nn.Module, path: str, rank: int, alpha: float, strength: float = 1.0) -> LoRA:
    parent, name = parent_of(network, path)
    lora = LoRA(getattr(parent, name), rank, alpha, strength)
    setattr(parent, name, lora)
    return lora


def insert(
    sd, rank: int, alpha: float, targets: str = "attention", text_rank: int = 0, seed: int = 0
) -> dict[str, LoRA]:
    """Put fresh LoRAs into the model: kohya name -> LoRA. `targets` is "attention", "attention+ff" or with "+conv"."""
    ends = sum((TARGETS[t] for t in targets.split("+")), ())
    out = {}
    for name, (network, path) in layers(sd).items():
        text = network is sd.text.encoder
        r = text_rank if text else rank
        if not r or not path.endswith(tuple("." + e for e in (TEXT_TARGETS if text else ends))):
            continue
        lora = out[name] = wrap(network, path, r, alpha * r / rank)
        bound = 1 / math.sqrt(lora.down[0].numel())  # kaiming_uniform(a=sqrt 5), as nn.Linear and kohya
        with torch.no_grad():
            lora.down.copy_(
                (torch.rand(lora.down.shape, generator=seeded_generator(seed, "lora", name)) * 2 - 1) * bound
            )
    return out


def remove(sd, loras: dict[str, LoRA]) -> None:
    """Take these LoRAs out; the model is what it was, to the bit."""
    places = layers(sd)
    for name, lora in loras.items():
        parent, child = parent_of(*places[name])
        current = getattr(parent, child)
        if current is lora:
            setattr(parent, child, lora.base)
            continue
        while current.base is not lora:
            current = current.base
        current.base = lora.base


@torch.no_grad()
def merge(sd, loras: dict[str, LoRA]) -> dict[str, Tensor]:
    """Add these LoRAs to the weights themselves, in fp32, and take them out: sampling costs what it did without them.
    Returns the weights as they were, for `unmerge`: subtracting would not give them back to the bit."""
    before = {}
    for name, lora in loras.items():
        layer = base_layer(lora)
        before[name] = layer.weight
        layer.weight = nn.Parameter(
            (layer.weight.float() + lora.delta()).to(layer.weight.dtype), requires_grad=False
        )
    remove(sd, loras)
    return before


def unmerge(sd, before: dict[str, Tensor]) -> None:
    """Put the weights back that `merge` gave; the model is what it was, to the bit."""
    places = layers(sd)
    for name, weight in before.items():
        network, path = places[name]
        base_layer(network.get_submodule(path)).weight = weight


# ------------------------------------------------------------------------------------------------------- the file
