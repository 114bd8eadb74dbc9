"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, equation 3).

    y = (W + scale * up down) x = W x + scale * up(down(x))
    scale = alpha / rank,     down: in -> rank,  up: rank -> out

W is frozen; `up` starts at zero, so step 0 is exactly the base model.  The file: formats/lora_file.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanokdiff.methods import inject
from hanokdiff.methods.inject import base_layer, unwrap
from hanokdiff.models import memory
from hanokdiff.seeding import seeded_generator

# What each choice of --targets adds, by the end of the module's name in the UNet.
TARGETS = {
    "cross-attention": ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "ff": ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    "conv": ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
}
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class LoRA(nn.Module):
    """A Linear or Conv2d (or a LoRA around one) and its low-rank change.

    down      (rank, in) or (rank, in, kh, kw), fp32, Kaiming-uniform
    up        (out, rank) or (out, rank, 1, 1), fp32, zeros; training casts both: `trainable`
    strength  scales the change once more, when sampling"""

    def __init__(self, base: nn.Module, rank: int, alpha: float, strength: float = 1.0):
        super().__init__()
        self.base, self.rank, self.alpha, self.strength = base, rank, alpha, strength
        w = base_layer(base).weight
        self.down = nn.Parameter(torch.empty(rank, *w.shape[1:], device=w.device))
        self.up = nn.Parameter(torch.zeros(w.shape[0], rank, *[1] * (w.dim() - 2), device=w.device))

    @property
    def scale(self) -> float:
        return self.strength * self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_narrow():
            return self.base(x) + self.scale * self.up_down(x)
        base, weight = self.base, self.base.weight + self.delta()
        if weight.dim() == 2:
            return F.linear(x, weight, base.bias)
        return F.conv2d(x, weight, base.bias, base.stride, base.padding)

    def is_narrow(self) -> bool:
        """Whether one product with W + delta is less work than W's and two more. Per row of x its gradient
        costs in * out, theirs with their forward pass 3 * rank * (in + out), and as much again in passes over
        memory (docs/LOG.md, section 24). In fp32 only: bf16 would round a small delta away."""
        if not isinstance(self.base, nn.Linear | nn.Conv2d) or self.base.weight.dtype != torch.float32:
            return False
        rank, inputs, outputs = self.rank, self.down[0].numel(), len(self.up)
        return inputs * outputs <= 6 * rank * (inputs + outputs)

    def up_down(self, x: Tensor) -> Tensor:
        """up(down(x)), in x's precision; a convolution's `down` has its stride and padding, `up` is 1x1."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if down.dim() == 2:
            return F.linear(F.linear(x, down), up)
        conv = base_layer(self.base)
        return F.conv2d(F.conv2d(x, down, None, conv.stride, conv.padding), up)

    def exact(self) -> tuple[Tensor, Tensor]:
        """down and up in fp32, with all the digits that are known."""
        return tuple(getattr(p, "master", p).float() for p in (self.down, self.up))

    def delta(self) -> Tensor:
        """The change of the weight, in fp32 and in the weight's shape: scale * up @ down."""
        down, up = self.exact()
        product = up.flatten(1) @ down.flatten(1)
        return self.scale * product.view(base_layer(self.base).weight.shape)


def trainable(loras: dict[str, LoRA]) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name. In a network of half precision they become copies of its
    precision, which the trainer makes anew once a step from the fp32 numbers in `p.master`: to cast each
    where it is used would be four more launches per layer and step."""
    params = {}
    for name, lora in loras.items():
        for part in ("down", "up"):
            p, dtype = getattr(lora, part), base_layer(lora).weight.dtype
            if p.dtype != dtype:
                p = nn.Parameter(p.detach().to(dtype))
                p.master = getattr(lora, part).detach()
                setattr(lora, part, p)
            params[f"{name}.{part}"] = p.requires_grad_(True)
        memory.fuse_low_rank(lora)
    return params


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
    """Put a LoRA around the layer at a path, and around the LoRAs already there."""
    return inject.wrap(network, path, lambda base: LoRA(base, rank, alpha, strength))


def insert(sd, rank: int, alpha: float, targets="attention", text_rank: int = 0, seed: int = 0) -> dict:
    """Put fresh LoRAs into the model: kohya name -> LoRA. `targets` is "cross-attention", "attention",
    "attention+ff" or "attention+ff+conv"."""
    unet_ends = sum((TARGETS[t] for t in targets.split("+")), ())
    out = {}
    for name, (network, path) in layers(sd).items():
        r, ends = (text_rank, TEXT_TARGETS) if network is sd.text.encoder else (rank, unet_ends)
        if not r or not path.endswith(tuple("." + end for end in ends)):
            continue
        lora = out[name] = wrap(network, path, r, alpha * r / rank)
        bound = 1 / math.sqrt(lora.down[0].numel())  # kaiming_uniform(a=sqrt 5), as nn.Linear and kohya
        with torch.no_grad():
            uniform = torch.rand(lora.down.shape, generator=seeded_generator(seed, "lora", name))
            lora.down.copy_((uniform * 2 - 1) * bound)
    return out


def remove(sd, loras: dict[str, LoRA]) -> None:
    """Take these LoRAs out; the model is what it was, to the bit."""
    places = layers(sd)
    for name, lora in loras.items():
        unwrap(*places[name], lora)


@torch.no_grad()
def merge(sd, loras: dict[str, LoRA]) -> dict[str, Tensor]:
    """Add these LoRAs to the weights themselves, in fp32, and take them out: sampling costs what it did
    without them. Returns the former weights for `unmerge`: subtracting would not give them back exactly."""
    before = {}
    for name, lora in loras.items():
        layer = base_layer(lora)
        before[name] = layer.weight
        changed = (layer.weight.float() + lora.delta()).to(layer.weight.dtype)
        layer.weight = nn.Parameter(changed, requires_grad=False)
    remove(sd, loras)
    return before


def unmerge(sd, before: dict[str, Tensor]) -> None:
    """Put the weights back that `merge` gave; the model is what it was, to the bit."""
    places = layers(sd)
    for name, weight in before.items():
        network, path = places[name]
        base_layer(network.get_submodule(path)).weight = weight
