"""Whole models on disk: the folder layout of diffusers, read and written.

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/

Each network is built on the meta device (no memory, no random numbers) and its tensors are mapped from the file.
Whatever is missing, left over or of the wrong shape is an error that names it: a checkpoint never loads halfway.
"""

import json
import os
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # VAEs published in 2022
PARTS = {  # folder -> file name without its ending, as diffusers and transformers write it
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


def find(model: str) -> Path:
    """The folder of a model: a local one, else a hub id ("owner/name") from the cache or the hub."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{model} is a file; give a model folder (one that holds model_index.json)")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f'no model folder at "{model}"; give a folder with model_index.json, a hub id, or "tiny"')
    from huggingface_hub import snapshot_download  # only here: nothing else may touch the network

    wanted = ["model_index.json", "*/config.json", "scheduler/*", "tokenizer/*", "unet/*model*.safetensors",
              "vae/*model*.safetensors", "text_encoder/*model*.safetensors"]  # fmt: skip
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as e:  # offline, unknown id, no permission: the hub has a class for each
        reason = str(e).strip().split("\n")[0]
        raise ValueError(f'no folder "{model}" here, nor from the hub ({reason}); name a local folder') from None


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: not a complete model folder in the diffusers layout") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not valid JSON ({e}); download it again") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file (memory-mapped) or of a .bin file (read without running code)."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, UnpicklingError, EOFError, OSError) as e:
        reason = str(e).split("\n")[0]
        raise ValueError(f"{path} cannot be read ({reason}); it is damaged or incomplete, fetch it again") from None


def weights_file(folder: Path, stem: str) -> Path:
    names = [f"{stem}{variant}{end}" for end in (".safetensors", ".bin") for variant in ("", ".fp16")]
    names.append("pytorch_model.bin")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds no weights: expected {names[0]} there (or .fp16.safetensors, .bin)")


def plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as our modules have them: no `text_model.`, today's attention names, no position_ids."""
    out = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix("text_model.").split(".")
        if parts[-1] == "position_ids":
            continue
        if len(parts) > 1 and "attentions" in parts and parts[-2] in OLD_ATTENTION:
            parts[-2] = OLD_ATTENTION[parts[-2]]
            tensor = tensor.flatten(1) if tensor.dim() == 4 else tensor  # 1x1 convolutions of old
        out[".".join(parts)] = tensor
    return out


def fill(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> nn.Module:
    """Give a module built on the meta device its tensors; every name and shape must match."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        what = [f"{len(names)} {kind} (such as {names[0]})" for kind, names in
                (("missing", missing), ("left over", extra)) if names]  # fmt: skip
        raise ValueError(f"{source}: {len(own) - len(missing)} of {len(own)} tensors matched, {', '.join(what)}; "
                         "the file does not belong to the config.json beside it")  # fmt: skip
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{source}: {name} has shape {tuple(tensor.shape)}, but config.json asks for "
                             f"{tuple(own[name].shape)}")  # fmt: skip
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval()


def load_part(folder: Path, part: str, network: type, config: type) -> nn.Module:
    """One network of a model folder, with frozen weights mapped from the file."""
    c = read_json(folder / part / "config.json")
    try:
        with torch.device("meta"):
            module = network(config.from_json(c))
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        file = folder / part / "config.json"
        raise ValueError(f"{file} does not describe a Stable Diffusion {part} ({e!r})") from None
    file = weights_file(folder / part, PARTS[part])
    return fill(module, plain_names(read_tensors(file)), file)


def load_tokenizer(folder: Path):
    """The library's CLIP tokenizer: vocab.json and merges.txt, or the tokenizer.json that transformers 5 writes."""
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file() and not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder / name} is missing: not a complete model folder in the diffusers layout")
    from transformers import CLIPTokenizer  # lazily: half a second that --help need not wait for

    return CLIPTokenizer.from_pretrained(folder)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file aside, sync it, then rename it: what was there stays whole until then."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path} was not written: {name} has a value that is not finite; lower the learning rate")
    aside = path.with_name(path.name + ".part")
    save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, aside, metadata)
    sync_rename(aside, path)


def sync_rename(aside: Path, path: Path) -> None:
    """Make sure the bytes are on the disk, then put the file in its place in one step."""
    with open(aside, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(aside, path)


def save_folder(folder: Path, unet, vae, encoder, tokenizer, schedule, dtype: torch.dtype = torch.float32) -> None:
    """Write a whole model as a diffusers folder. The text encoder's names get their `text_model.` back."""
    for part, module in (("unet", unet), ("vae", vae), ("text_encoder", encoder)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        prefix = "text_model." if part == "text_encoder" else ""
        tensors = {prefix + k: t.to(dtype) for k, t in module.state_dict().items()}
        write_tensors(tensors, folder / part / f"{PARTS[part]}.safetensors", {"format": "pt"})
        write_json(folder / part / "config.json", module.config.to_json())
    save_tokenizer(tokenizer, folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", schedule.to_json())
    index = {
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False,
    }  # fmt: skip
    write_json(folder / "model_index.json", index)


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Today's tokenizer.json, and the vocab.json and merges.txt that older tools read."""
    tokenizer.save_pretrained(folder)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(m if isinstance(m, str) else " ".join(m) for m in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    vocab = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync_rename(aside, path)
