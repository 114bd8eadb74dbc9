"""Hypernetworks: small networks that change what goes into attention's keys and values.

    keys   = to_k(x + strength f_K(x))       f: Linear, activation, Linear ...; f = 0 is the base model
    values = to_v(x + strength f_V(x))       Kurumuz 2022; the WebUI's are the standard

x is the prompt's context in cross-attention (width 768 in SD 1.x), the picture's own tokens in self-attention
(320, 640, 1280); one pair (f_K, f_V) serves all layers of a width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hanokdiff.methods.inject import InputWrapper, base_layer, unwrap, wrap
from hanokdiff.models.unet import Attention
from hanokdiff.seeding import seeded_generator


def activations() -> dict[str, type[nn.Module] | None]:
    """The WebUI's names: torch's in lower case, but its "swish" is Hardswish."""
    module = nn.modules.activation
    torchs = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    left_out = (nn.MultiheadAttention, nn.Threshold, nn.GLU)
    names = {kind.__name__.lower(): kind for kind in torchs if kind not in left_out}
    return {**names, "linear": None, "swish": nn.Hardswish}


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
        layers, shown = self.layers, " ".join(f"{x:g}" for x in self.layers[:40])
        if len(layers) < 2 or layers[0] != 1 or layers[-1] != 1:
            must = "must begin and end with 1, such as 1 2 1: each is a multiple of the width"
            raise ValueError(f"layers are {shown}, but {must}")
        if not all(1 / 64 <= x <= 64 for x in layers) or len(layers) > 32:
            must = "each must be from 1/64 to 64, and there are at most 32 of them"
            raise ValueError(f"layers are {shown}, but {must}")
        if self.activation not in ACTIVATIONS:
            known = "the WebUI's are linear, relu, leakyrelu, elu, swish, tanh, sigmoid"
            lower = "and torch's by their lower-case names"
            raise ValueError(f'activation "{self.activation}" is not known; {known}, {lower}')
        if self.dropout and (len(self.dropout) != len(layers) or not all(0 <= p < 1 for p in self.dropout)):
            must = f"one number from 0 to below 1 for each of {len(layers)} layers is needed"
            raise ValueError(f"dropout is {self.dropout}: {must}")


class ResidualMLP(nn.Module):
    """f of one width d. The indices of `linear` are in the file's tensor names: every part counts."""

    def __init__(self, d: int, config: HypernetConfig):
        super().__init__()
        widths, parts, last = [int(d * x) for x in config.layers], [], len(config.layers) - 2
        activation = ACTIVATIONS[config.activation]
        for i in range(last + 1):
            parts.append(nn.Linear(widths[i], widths[i + 1]))
            if activation is not None and (i < last or config.activate_output):
                parts.append(activation())
            if config.layer_norm:  # after the last Linear too, as in the WebUI
                parts.append(nn.LayerNorm(widths[i + 1]))
            if config.dropout and config.dropout[i + 1] > 0:
                parts.append(nn.Dropout(config.dropout[i + 1]))
        self.linear = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    @torch.no_grad()
    def init_weights(self, key) -> None:
        """Kaiming for all but the last layer, which is zero: the first step is exactly the base model."""
        weighted = [m for m in self.linear if isinstance(m, nn.Linear | nn.LayerNorm)]
        for i, m in enumerate(weighted):
            nn.init.zeros_(m.bias)
            if m is weighted[-1]:
                nn.init.zeros_(m.weight)
            elif isinstance(m, nn.Linear):
                noise = torch.randn(m.weight.shape, generator=seeded_generator(*key, i))
                m.weight.copy_(noise * (2 / m.in_features) ** 0.5)


class Hypernetwork(nn.Module):
    """One pair of networks (f_K, f_V) per width, and the strength. Weights are fp32, cast to x's dtype."""

    def __init__(self, config: HypernetConfig, widths, strength: float = 1.0):
        super().__init__()
        self.config, self.strength = config, strength
        pairs = {str(d): [ResidualMLP(d, config), ResidualMLP(d, config)] for d in sorted(widths)}
        self.pairs = nn.ModuleDict({d: nn.ModuleList(pair) for d, pair in pairs.items()})
        self._changed: dict = {}  # of the forward pass under way: the changed context of each side
        self._cast: dict = {}  # and the weights in the UNet's precision

    def init_weights(self, seed: int) -> "Hypernetwork":
        """Every network starts as f = 0: the first step is exactly the base model."""
        for width, pair in self.pairs.items():
            for f, side in zip(pair, "KV", strict=True):
                f.init_weights((seed, "hypernet", width, side))
        return self

    def change(self, x: Tensor, side: int) -> Tensor:
        """x + strength f(x), x (B, T, D); side 0 for keys, 1 for values. An x of another width stays."""
        if str(x.shape[-1]) not in self.pairs:
            return x
        f, key = self.pairs[str(x.shape[-1])][side], (x.shape[-1], side, x.dtype, torch.is_grad_enabled())
        if key not in self._cast:
            self._cast[key] = {name: p.to(x.dtype) for name, p in f.named_parameters()}
        return x + self.strength * torch.func.functional_call(f, self._cast[key], (x,))

    def change_context(self, x: Tensor, side: int) -> Tensor:
        """The same for the prompt's context, which all cross-attentions share: computed once."""
        key = (self.strength, self.training, torch.is_grad_enabled())
        seen, seen_key, changed = self._changed.get(side, (None, None, None))
        if seen is not x or seen_key != key:
            changed = self.change(x, side)
            self._changed[side] = (x, key, changed)
        return changed

    def before_forward(self, unet: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A hook of the UNet's: drop what the last forward pass left, whose graph is freed and whose weights
        may have changed. In training change the context here, outside of blocks that are run twice."""
        self._changed.clear()
        self._cast.clear()
        x, t, context = inputs
        context = context.to(unet.conv_norm_out.weight.dtype)
        if torch.is_grad_enabled():
            for side in (0, 1):
                self.change_context(context, side)
        return x, t, context

    @torch.no_grad()
    def ratio(self, context: Tensor) -> float:
        """|f(x)| / |x| on a context (B, T, D): how far it is from the base model (0)."""
        pair, x = self.pairs[str(context.shape[-1])], context.float()
        return torch.stack([f(x).norm() for f in pair]).div(x.norm()).max().item()


class HypernetLinear(InputWrapper):
    """A to_k or to_v (or what wraps it) whose input a hypernetwork changes first."""

    def __init__(self, base: nn.Module, hypernet: Hypernetwork, side: int, is_cross: bool):
        super().__init__()
        self.base, self.side, self.is_cross = base, side, is_cross
        self._hypernet = [hypernet]  # in a list, so that it does not become a module of the UNet

    def forward(self, x: Tensor) -> Tensor:
        (hypernet,) = self._hypernet
        x = hypernet.change_context(x, self.side) if self.is_cross else hypernet.change(x, self.side)
        return self.base(x)


def kv_layers(sd) -> Iterator[tuple[str, int, bool]]:
    """(path, 0 for keys or 1 for values, whether of cross-attention) of every to_k and to_v in the UNet."""
    attentions = [(path, m) for path, m in sd.unet.named_modules() if isinstance(m, Attention)]
    for path, _ in attentions:
        for side, name in enumerate(("to_k", "to_v")):
            yield f"{path}.{name}", side, path.endswith("attn2")


def dims(sd) -> dict[str, list[int]]:
    """The widths that --widths names in this model: the context's alone, or with those of self-attention."""
    context = sd.unet.config.cross_attention_dim
    every = {base_layer(m.to_q).in_features for m in sd.unet.modules() if isinstance(m, Attention)}
    return {"context": [context], "all": sorted({context, *every})}


def trainable(hypernet: Hypernetwork) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return dict(hypernet.named_parameters())


def insert(sd, hypernet: Hypernetwork) -> Hypernetwork:
    """Put a hypernetwork in front of every to_k and to_v, after the hypernetworks already there."""
    hypernet.to(sd.device)
    hypernet._layers = []
    for path, *where in kv_layers(sd):
        layer = wrap(sd.unet, path, lambda base: HypernetLinear(base, hypernet, *where))  # noqa: B023
        hypernet._layers.append((path, layer))
    hypernet.hook = sd.unet.register_forward_pre_hook(hypernet.before_forward)
    return hypernet


def remove(sd, hypernet: Hypernetwork) -> None:
    """Take it out again; the model is what it was, to the bit."""
    hypernet.hook.remove()
    for path, layer in hypernet._layers:
        unwrap(sd.unet, path, layer)
    hypernet._layers = []
