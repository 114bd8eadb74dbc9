"""Tensors in files: .safetensors, and what torch.save wrote, read without running code."""

import os
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hanokdiff.files import replacing
from hanokdiff.formats.validate import check_tensors, damaged


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file (memory-mapped) or of a .bin file (read without running code)."""
    if path.suffix != ".safetensors":
        return read_pickle(path)
    return read_safetensors(path, "model")[0]


def read_safetensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped) and metadata. The library refuses headers that promise more than there is."""
    if not path.is_file():
        raise ValueError(f"no {what} file at {path}")
    try:
        with safe_open(path, "pt") as f:
            return load_file(path), f.metadata() or {}
    except Exception as e:  # SafetensorError, OSError; of a dtype that torch lacks, others
        raise damaged(path, e) from None


def read_pickle(path: Path) -> dict:
    """A table that torch.save wrote, tensors mapped where the container allows it."""
    content = read_pt(path, "model")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a table of tensors; it is no model")
    return content


def read_pt(path: Path, what: str):
    """The content of any file that torch.save wrote. Code in it is refused, never run."""
    if not Path(path).is_file():
        raise ValueError(f"no {what} file at {path}")
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and (packed := [i for i in zipfile.ZipFile(path).infolist() if i.compress_type]):
            # may be a bomb
            raise RuntimeError(f"{packed[0].filename} in it is compressed, which torch never does")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        check_tensors(content, path.stat().st_size)
        return content
    except Exception as e:  # a damaged pickle can fail in any way
        calls = re.search(r"GLOBAL (\S+)|persistent_load|[Cc]an only \w+", str(e))
        if calls is None or not isinstance(e, UnpicklingError):
            raise damaged(path, e) from None
        needs = f"{path} needs more than tensors ({calls[1] or calls[0]})"
        way = f"get this {what} as .safetensors, or convert it where you trust it"
        raise ValueError(f"{needs}; that could be any code, so it was not run: {way}") from None


class Inert:
    """What stands for an object of a class that is not opened: it takes anything and does nothing."""

    def __init__(self, *_, **__):
        pass

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __setstate__(self, _):
        pass


MOST_CLASSES = 64  # that a checkpoint may hold besides its tensors
# no model needs these
NEVER = ("os", "sys", "posix", "nt", "subprocess", "commands", "builtins", "__builtin__")


def read_checkpoint(path: Path) -> dict:
    """A training checkpoint's table. The official SD 1 files hold a callback of pytorch_lightning: every
    class that is not torch's own becomes an inert stand-in, and nothing of it is imported or run."""
    strange: list = []
    for _ in range(MOST_CLASSES):
        try:
            with torch.serialization.safe_globals(strange):
                return read_pickle(path)
        except ValueError as e:
            found = re.search(r"needs more than tensors \(([\w.]+\.[\w]+)\)", str(e))
            # what torch never allows is refused
            if not found or found[1] in [name for _, name in strange] or found[1].split(".")[0] in NEVER:
                raise
            strange.append((type("Inert", (Inert,), {}), found[1]))
    many = f"{path} holds more than {MOST_CLASSES} kinds of objects"
    raise ValueError(f"{many}; get this model as .safetensors")


def read_single_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str], int | None]:
    """A single file's tensors, its metadata (.safetensors), and the training step that it tells (.ckpt)."""
    if path.suffix == ".safetensors":
        return *read_safetensors(path, "model"), None
    held = read_checkpoint(path)
    tensors, step = held.get("state_dict", held), held.get("global_step")
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: its state_dict is a {type(tensors).__name__}, not a table of tensors")
    tensors = {k: t for k, t in tensors.items() if isinstance(k, str) and isinstance(t, Tensor)}
    return tensors, {}, step if isinstance(step, int) else None


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file aside, sync it, then rename it: what was there stays whole until then."""
    for name, tensor in tensors.items():
        # the extremes are NaN if any value is; isfinite on all of them takes 30 times as long on a CPU
        numbers = tensor.is_floating_point() and tensor.numel()
        if numbers and not torch.isfinite(torch.stack(tensor.aminmax())).all():
            bad = f"{path} was not written: {name} has a value that is not finite"
            raise ValueError(f"{bad}; lower the learning rate")
    tensors = {k: t.detach().contiguous().cpu() for k, t in tensors.items()}
    with replacing(path) as aside:
        save_file(tensors, aside, metadata)
        os.umask(mask := os.umask(0))
        os.chmod(aside, 0o666 & ~mask)  # safetensors makes it readable for its owner only


def write_pt(content: dict, path: Path) -> None:
    """Write a .pt that the WebUI accepts: plain containers and tensors in torch's older container. Its
    checker refuses the members that torch.save adds to the newer one since 2.x."""
    with replacing(path) as aside:
        torch.save(content, aside, _use_new_zipfile_serialization=False)
