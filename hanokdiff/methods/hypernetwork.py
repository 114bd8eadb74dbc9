"""Hypernetworks: small networks that rewrite what attention listens to (Kurumuz 2022; the WebUI's are the standard).

    keys   = to_k(x + strength f_K(x))          f: Linear, activation, Linear ... residual, so f = 0 is the base model
    values = to_v(x + strength f_V(x))

x is the context of the words in cross-attention (width 768 in SD 1.x), the picture's own tokens in self-attention
(320, 640, 1280); one pair (f_K, f_V) serves all layers of a width.  The file format is the WebUI's .pt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hanokdiff.methods.inject import base_layer
from hanokdiff.models.unet import Attention
from hanokdiff.seeding import seeded_generator


def activations() -> dict[str, type[nn.Module] | None]:
    """The WebUI's names. Its "swish" is Hardswish; beyond its own few it knows torch's, in lower case."""
    own = {
        "linear": None,
        "relu": nn.ReLU,
        "leakyrelu": nn.LeakyReLU,
        "elu": nn.ELU,
        "swish": nn.Hardswish,
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
    }
    torchs = vars(nn.modules.activation).items()
    more = {
        k.lower(): v
        for k, v in torchs
        if isinstance(v, type) and v.__module__ == nn.modules.activation.__name__
    }
    return {**{k: v for k, v in more.items() if k not in ("multiheadattention", "threshold", "glu")}, **own}


ACTIVATIONS = activations()


@dataclass(frozen=True)
class HypernetConfig:
    """What one network looks like: layers as multiples of the width, and what follows each Linear."""

    layers: tuple[float, ...] = (1, 2, 1)
    activation: str = "linear"
    layer_norm: bool = False
    dropout: tuple[float, ...] = ()  # one per entry of layers, after that layer; none by default
    activate_output: bool = False
    weight_init: str = "Normal"  # as the file says; nothing is read from it

    def __post_init__(self):
        if (
            len(self.layers) < 2
            or self.layers[0] != 1
            or self.layers[-1] != 1
            or not all(x > 0 for x in self.layers)
        ):
            raise ValueError(
                f"layers are {' '.join(f'{x:g}' for x in self.layers)}, but must begin and end with 1, "
                "such as 1 2 1: each is a multiple of the width"
            )
        if max(self.layers) > 64 or min(self.layers) < 1 / 64 or len(self.layers) > 32:
            raise ValueError(
                f"layers are {' '.join(f'{x:g}' for x in self.layers[:40])}, but each must be from 1/64 "
                "to 64, and there are at most 32 of them"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f'activation "{self.activation}" is not known; the WebUI\'s are linear, relu, leakyrelu, '
                "elu, swish, tanh, sigmoid, and torch's by their lower-case names"
            )
        if self.dropout and (
            len(self.dropout) != len(self.layers) or not all(0 <= p < 1 for p in self.dropout)
        ):
            raise ValueError(
                f"dropout is {self.dropout}: one number from 0 to below 1 for each of {len(self.layers)} "
                "layers is needed"
            )


class ResidualMLP(nn.Module):
    """f of one width d. `linear` is a Sequential whose indices are the file's names: every activation and dropout that
    is there takes a number of its own."""

    def __init__(self, d: int, spec: HypernetConfig):
        super().__init__()
        widths, parts, last = [int(d * x) for x in spec.layers], [], len(spec.layers) - 2
        activation = ACTIVATIONS[spec.activation]
        for i in range(last + 1):
            parts.append(nn.Linear(widths[i], widths[i + 1]))
            if activation is not None and (i < last or spec.activate_output):
                parts.append(activation())
            if spec.layer_norm:  # after the last Linear too, as in the WebUI
                parts.append(nn.LayerNorm(widths[i + 1]))
            if spec.dropout and spec.dropout[i + 1] > 0:
                parts.append(nn.Dropout(spec.dropout[i + 1]))
        self.linear = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    @torch.no_grad()
    def start(self, key) -> None:
        """Kaiming for all but the last layer, which is zero: the first step is exactly the base model."""
        learnt = [m for m in self.linear if isinstance(m, nn.Linear | nn.LayerNorm)]
        for i, m in enumerate(learnt):
            nn.init.zeros_(m.bias)
            if m is learnt[-1]:
                nn.init.zeros_(m.weight)
            elif isinstance(m, nn.Linear):
                noise = torch.randn(m.weight.shape, generator=seeded_generator(*key, i))
                m.weight.copy_(noise * (2 / m.in_features) ** 0.5)


class Hypernetwork(nn.Module):
    """The pairs of all widths, and the strength. `rewrite` changes x (B, T, D); others stay as they are."""

    def __init__(self, spec: HypernetConfig, widths, strength: float = 1.0):
        super().__init__()
        self.spec, self.strength = spec, strength
        self.pairs = nn.ModuleDict(
            {str(d): nn.ModuleList([ResidualMLP(d, spec), ResidualMLP(d, spec)]) for d in sorted(widths)}
        )
        self._last: dict = {}  # of this forward: the words rewritten, and the weights in the network's precision
        self._cast: dict = {}

    def rewrite(self, x: Tensor, which: int) -> Tensor:
        """x + strength f(x); which is 0 for keys, 1 for values. The weights learn in fp32 and work in x's precision."""
        if str(x.shape[-1]) not in self.pairs:
            return x
        f, key = self.pairs[str(x.shape[-1])][which], (x.shape[-1], which, x.dtype, torch.is_grad_enabled())
        if key not in self._cast:
            self._cast[key] = {name: p.to(x.dtype) for name, p in f.named_parameters()}
        return x + self.strength * torch.func.functional_call(f, self._cast[key], (x,))

    def once(self, x: Tensor, which: int) -> Tensor:
        """The same for the words' context, which all layers share: computed for the first of them."""
        key = (self.strength, self.training, torch.is_grad_enabled())
        seen, how, y = self._last.get(which, (None, None, None))
        if seen is not x or how != key:
            y = self.rewrite(x, which)
            self._last[which] = (x, key, y)
        return y

    def forget(self, *_) -> None:
        """Before a forward: the graph of the last one is spent, the weights may have moved."""
        self._last.clear()
        self._cast.clear()

    @torch.no_grad()
    def ratio(self, context: Tensor) -> float:
        """|f(x)| / |x| on a context (B, T, D): how far it has gone from the base; 1 is as loud as the words."""
        pair = self.pairs[str(context.shape[-1])]
        return max((f(context.float()).norm() / context.float().norm()).item() for f in pair)


class HypernetLinear(nn.Module):
    """A Linear (or what wraps it) behind one or more hypernetworks, applied in the order in which they were loaded."""

    def __init__(self, base: nn.Module, which: int, context: bool):
        super().__init__()
        self.base, self.which, self.context = base, which, context
        self.chain: list[Hypernetwork] = []  # not modules of the UNet's: a plain list

    def forward(self, x: Tensor) -> Tensor:
        for h in self.chain:
            x = h.once(x, self.which) if self.context else h.rewrite(x, self.which)
        return self.base(x)


def kv_layers(sd):
    """(attention module, "to_k" or "to_v", 0 or 1, whether it listens to the words) of every attention in the UNet."""
    for path, module in sd.unet.named_modules():
        if isinstance(module, Attention):
            for which, name in enumerate(("to_k", "to_v")):
                yield module, name, which, path.endswith("attn2")


def dims(sd) -> dict[str, list[int]]:
    """What --widths may mean in this model: the words' width alone, or with those of self-attention."""
    context = sd.unet.config.cross_attention_dim
    every = {base_layer(m.to_q).in_features for m in sd.unet.modules() if isinstance(m, Attention)}
    return {"context": [context], "all": sorted({context, *every})}


def insert(sd, hypernet: Hypernetwork) -> Hypernetwork:
    """Put a hypernetwork in front of every to_k and to_v, behind those already there."""
    hypernet.to(sd.device)
    for attention, name, which, context in kv_layers(sd):
        module = getattr(attention, name)
        if not isinstance(module, HypernetLinear):
            module = HypernetLinear(module, which, context)
            setattr(attention, name, module)
        module.chain.append(hypernet)
    hypernet.hook = sd.unet.register_forward_pre_hook(hypernet.forget)
    return hypernet


def remove(sd, hypernet: Hypernetwork) -> None:
    """Take it out again; the model is what it was, to the bit."""
    hypernet.hook.remove()
    for attention, name, _, _ in kv_layers(sd):
        module = getattr(attention, name)
        if isinstance(module, HypernetLinear) and hypernet in module.chain:
            module.chain.remove(hypernet)
            if not module.chain:
                setattr(attention, name, module.base)


# ------------------------------------------------------------------------------------------------------- the file
