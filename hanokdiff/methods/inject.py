"""Replacing a layer of a frozen network by a wrapper around it, and taking the wrapper out again.

A wrapper is a module that holds what it wraps as `base`: a LoRA, a hypernetwork's layer, an extended
embedding.  They can be stacked and taken out in any order; the network itself knows nothing of them.
"""

from collections.abc import Callable

from torch import nn


class InputWrapper(nn.Module):
    """A wrapper that changes what goes into a layer. It stays outside of those that change what comes out."""


def base_layer(module: nn.Module) -> nn.Module:
    """The network's own layer inside all wrappers."""
    while not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
        module = module.base
    return module


def wrap(network: nn.Module, path: str, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace what stands at a path, inside of its input wrappers, by make(it); returns the new wrapper."""
    parent, name = _parent_of(network, path)
    while isinstance(getattr(parent, name), InputWrapper):
        parent, name = getattr(parent, name), "base"
    wrapper = make(getattr(parent, name))
    setattr(parent, name, wrapper)
    return wrapper


def unwrap(network: nn.Module, path: str, wrapper: nn.Module) -> None:
    """Take one wrapper out, wherever it stands among others."""
    parent, name = _parent_of(network, path)
    while getattr(parent, name) is not wrapper:
        parent, name = getattr(parent, name), "base"
    setattr(parent, name, wrapper.base)


def _parent_of(network: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return network.get_submodule(parent), name
