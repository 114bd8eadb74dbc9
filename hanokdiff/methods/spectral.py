"""SVDiff: train the singular values of a model's weights (Han et al. 2023, arXiv:2303.11305, equation 4).

    W = U diag(s) V',     W_delta = U diag(relu(s + delta)) V'        delta: one number per singular value

A convolution's weight is taken as a matrix (out, in k k). SD 1.5's UNet has
222,696 singular values for its 860 million numbers, so the file is small and little can be forgotten.
The file: formats/delta_file.py.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanokdiff.methods.inject import base_layer, unwrap, wrap


class SpectralShift(nn.Module):
    """A Linear or Conv2d whose singular values are shifted by `delta` (r,) fp32, r = min(out, in k k)."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        weight = base_layer(base).weight
        self.exact = getattr(weight, "master", weight).detach().float()  # with all the digits that are known
        u, s, vh = torch.linalg.svd(self.exact.flatten(1).to(weight.device), full_matrices=False)
        self.u, self.s, self.vh = u, s, vh  # not buffers: they are not saved
        self.delta = nn.Parameter(torch.zeros_like(s))

    def change(self) -> Tensor:
        """W_delta - W in the weight's shape, fp32: exactly 0 at delta = 0."""
        shift = torch.relu(self.s + self.delta) - self.s
        return ((self.u * shift) @ self.vh).view(self.exact.shape)

    def weight(self) -> Tensor:
        """W_delta, fp32."""
        return self.exact.to(self.s.device) + self.change()

    def forward(self, x: Tensor) -> Tensor:
        layer = base_layer(self.base)
        weight = (layer.weight + self.change()).to(layer.weight.dtype)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)


def insert(network: nn.Module) -> dict[str, SpectralShift]:
    """Put a shift of 0 around every Linear and Conv2d of a network: path -> SpectralShift."""
    layers = [path for path, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return {path: wrap(network, path, SpectralShift) for path in layers}


@contextlib.contextmanager
def folded(network: nn.Module, shifts: dict[str, SpectralShift]) -> Iterator[None]:
    """Inside, the network is a plain one that has the changed weights: to save it as a model."""
    before = {path: shift.base.weight for path, shift in shifts.items()}
    for path, shift in shifts.items():
        unwrap(network, path, shift)
        shift.base.weight = nn.Parameter(shift.weight().detach(), requires_grad=False)
    try:
        yield
    finally:
        for path, shift in shifts.items():
            shift.base.weight = before[path]
            wrap(network, path, lambda _: shift)  # noqa: B023


@torch.no_grad()
def merge(network: nn.Module, deltas: dict[str, Tensor]) -> None:
    """Change the weights of a network for good: layer's path -> delta (r,)."""
    for path, delta in deltas.items():
        layer = base_layer(network.get_submodule(path))
        shift = SpectralShift(layer)
        shift.delta.copy_(delta)
        layer.weight = nn.Parameter(shift.weight().to(layer.weight.dtype), requires_grad=False)
