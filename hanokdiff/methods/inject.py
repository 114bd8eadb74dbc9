"""Finding and replacing layers inside a frozen network."""

from torch import nn


def base_layer(module: nn.Module) -> nn.Module:
    while not isinstance(module, nn.Linear | nn.Conv2d):
        module = module.base
    return module
