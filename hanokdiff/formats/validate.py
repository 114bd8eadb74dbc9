"""Checks on what a model file holds before anything is built from it."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from hanokdiff.files import read_json, what_else


def check_kind(folder: Path) -> None:
    """Whether a model folder is of Stable Diffusion 1 or 2, by the parts that model_index.json names."""
    index = folder / "model_index.json"
    if not index.is_file():
        inner = [file.parent for file in sorted(folder.glob("*/model_index.json"))]
        wanted = inner[0] if inner else "the folder that holds it"
        raise ValueError(f"{index} is missing: not a model folder in the diffusers layout; name {wanted}")
    index = read_json(index)
    for part in ("text_encoder_2", "transformer", "prior"):
        if index.get(part) not in (None, [None, None]):
            kind = f"{str(index.get('_class_name'))[:60]}, a model with a {part} (such as SDXL or SD 3)"
            raise ValueError(f"{folder} is a {kind}; only Stable Diffusion 1.x and 2.x are supported")


def check_tensors(content, size: int) -> None:
    """A pickle can promise tensors that it does not hold: by strides of 0, sparse, or on the meta device."""
    todo, seen = [content], set()
    while todo:
        x = todo.pop()
        if id(x) in seen:  # a list can hold itself
            continue
        seen.add(id(x))
        if isinstance(x, dict | nn.Module):
            todo += (x if isinstance(x, dict) else vars(x)).values()
        elif isinstance(x, list | tuple | set):
            todo += x
        elif isinstance(x, Tensor) and (x.layout != torch.strided or not x.is_cpu or x.nbytes > size):
            raise RuntimeError(f"a tensor of shape {tuple(x.shape)} on {x.device} is not in the file")


def whole_number(x) -> int:
    """A whole number that some file holds as one or as text; 0 if it is something else."""
    return int(x) if isinstance(x, int) or (isinstance(x, str) and x.isdecimal() and len(x) < 20) else 0


def all_finite(t: Tensor) -> bool:
    """Whether every number is; by way of float32, since torch does not compare 8-bit ones. A sum is finite
    only if all are, and takes one pass without a copy; one that is not may have overflowed."""
    if t.element_size() > 1 and torch.isfinite(t.sum(dtype=torch.float32)):
        return True
    return bool(torch.isfinite(t.float()).all())


def damaged(path: Path, e: Exception) -> ValueError:
    if other := what_else(path):
        return ValueError(f"{path} cannot be read: it is {other}")
    # of a KeyError all is "a"
    reason = (str(e) if len(str(e)) > 3 else repr(e)).split("\n")[0].split(". ")[0]
    reason = "it is empty" if path.is_file() and not path.stat().st_size else reason
    return ValueError(f"{path} cannot be read ({reason}); it is damaged or incomplete, fetch it again")


def check_names(asked: Iterable[str], held: Iterable[str], source: Path, hint: str) -> None:
    """Every tensor that is asked for must be there, and none besides."""
    asked, held = set(asked), set(held)
    missing, extra = sorted(asked - held), sorted(held - asked)
    if missing or extra:
        odd = (("missing", missing), ("left over", extra))
        what = ", ".join(f"{len(names)} {kind} (such as {names[0]})" for kind, names in odd if names)
        matched = f"{len(asked) - len(missing)} of {len(asked)} tensors matched"
        raise ValueError(f"{source}: {matched}, {what}; {hint}")


def check_fit(unet, text, source) -> None:
    """Whether the configs of UNet and text encoder make one Stable Diffusion."""
    if unet.in_channels != 4:
        takes = f"the UNet takes {unet.in_channels} channels, not 4"
        raise ValueError(f"{source}: {takes}: inpainting and pix2pix models are not supported")
    if text.hidden_size != unet.cross_attention_dim:
        takes = f"the UNet takes {unet.cross_attention_dim}"
        raise ValueError(f"{source}: the text encoder is {text.hidden_size} wide, but {takes}")
