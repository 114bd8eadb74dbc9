"""Whole models on disk: the folder layout of diffusers, read and written (one file: see single_file.py).

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/

Each network is built on the meta device (no memory, no random numbers), its tensors are mapped from the file.
What is missing, left over or of the wrong shape is an error that names it: nothing loads halfway.
"""

import contextlib
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from hanokdiff.files import read_json, reason, write_json
from hanokdiff.formats.tensors import read_tensors, write_tensors
from hanokdiff.formats.tokenizer import save_tokenizer
from hanokdiff.formats.validate import check_names
from hanokdiff.pretrained import could_be_hub_id, parts_of

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # VAEs of 2022
# folder -> file name without its ending, as diffusers and transformers write it
PARTS = {**dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model"), "text_encoder": "model"}
ERRORS = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)
SINGLE_FILES = (".safetensors", ".ckpt")  # what single_file.py reads


def find_model(model: str) -> Path:
    """The folder or single file of a model: a local one, else a hub id ("owner/name") from cache or hub."""
    if not model.strip():
        way = 'give a folder with model_index.json, a single file, a hub id, or "tiny"'
        raise ValueError(f'the model is ""; {way}')
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix in SINGLE_FILES):
        return path
    if path.exists():
        other = f"{model} is a file, but not a {' or '.join(SINGLE_FILES)}"
        raise ValueError(f"{other}; give one of these, or a model folder (one that holds model_index.json)")
    if not could_be_hub_id(model):
        kinds = f"a single file ({', '.join(SINGLE_FILES)})"
        way = f'a folder with model_index.json, {kinds}, a hub id, or "tiny"'
        raise ValueError(f'no model folder at "{model}"; give {way}')
    return from_hub(model)


def from_hub(model: str) -> Path:
    """A hub id's folder: of each network the one file that would be opened, and no other variant (fp16, EMA
    and pickled copies of SD 1.5 are 5.6 GB beside its 4.3). Without the hub, what is in the cache."""
    # only here and for tokenizers: nothing else may touch the network
    from huggingface_hub import HfApi, snapshot_download

    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            return Path(snapshot_download(model, local_files_only=True))
        names = HfApi().list_repo_files(model)
        return Path(snapshot_download(model, allow_patterns=wanted_files(names)))
    except Exception as e:  # offline, unknown id, no permission: the hub has a class for each
        with contextlib.suppress(Exception):  # fetched before
            return Path(snapshot_download(model, local_files_only=True))
        reason = str(e).strip().split("\n")[0]
        none = f'no folder "{model}" here, nor from the hub ({reason})'
        raise ValueError(f"{none}; name a local folder") from None


def wanted_files(names: list[str]) -> list[str]:
    """Of a repository's files those that are opened."""
    small = [n for n in names if n == "model_index.json" or n.startswith(("scheduler/", "tokenizer/"))]
    for part, stem in PARTS.items():
        inside = [n.removeprefix(f"{part}/") for n in names if n.startswith(f"{part}/")]
        chosen = choose_weights(inside, stem)
        if chosen and chosen.endswith(".index.json"):
            small += [f"{part}/{n}" for n in inside if re.match(rf"{stem}.*-\d+-of-\d+\.", n)]
        small += [f"{part}/{n}" for n in (chosen, "config.json") if n in inside]
    return small


def choose_weights(names: list[str], stem: str) -> str | None:
    """Which of a folder's files holds the weights: the plain one, else in parts (its index), else in fp16,
    else another variant that is the only one; .safetensors before .bin."""
    for end in (".safetensors", ".bin"):
        file = stem + end
        plain = [file, f"{file}.index.json", f"{stem}.fp16{end}", f"{file}.index.fp16.json"]
        plain += ["pytorch_model.bin"] * (end == ".bin")
        variants = [n for n in names if re.fullmatch(rf"{stem}\.[\w-]+{end}", n)]
        found = [n for n in plain if n in names] + (variants if len(variants) == 1 else [])
        if found:
            return found[0]
    return None


def read_config(path: Path, config: type, what: str):
    """A config class filled from its JSON file."""
    c = read_json(path)
    try:
        return config.from_json(c)
    except ERRORS as e:
        raise ValueError(f"{path} does not describe {what} ({reason(e)})") from None


def weights_file(folder: Path, stem: str) -> Path:
    """The file of a network's weights, or the index of its parts."""
    names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    if chosen := choose_weights(names, stem):
        return folder / chosen
    variants = ", ".join(n for n in names if n.startswith(stem))
    several = f" (there are {variants}: rename the one to use)" if variants else ""
    expected = f"expected {stem}.safetensors there (or .fp16.safetensors, .bin){several}"
    raise ValueError(f"{folder} holds no weights: {expected}")


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of all the parts that an index names."""
    if file.suffix != ".json":
        return read_tensors(file)
    return {k: t for name in parts_of(file) for k, t in read_tensors(file.with_name(name)).items()}


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


def fill(module: nn.Module, tensors: dict[str, Tensor], source: Path, asker="config.json") -> nn.Module:
    """Give a module built on the meta device its tensors; every name and shape must match."""
    own = module.state_dict()
    check_names(own, tensors, source, "the file does not belong to the config.json beside it")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            wanted = f"{asker} asks for {tuple(own[name].shape)}"
            raise ValueError(f"{source}: {name} has shape {tuple(tensor.shape)}, but {wanted}")
        if not tensor.is_floating_point():
            only = "only weights in floating point can be used"
            raise ValueError(f"{source}: {name} is {tensor.dtype}; {only}")
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval()


def load_part(folder: Path, part: str, network: type, config: type) -> nn.Module:
    """One network of a model folder, with frozen weights mapped from the file."""
    file = folder / part / "config.json"
    c = read_config(file, config, f"a Stable Diffusion {part}")
    try:
        with torch.device("meta"):
            module = network(c)
    except ERRORS as e:
        raise ValueError(f"{file} does not describe a Stable Diffusion {part} ({reason(e)})") from None
    file = weights_file(folder / part, PARTS.get(part, PARTS["vae"]))
    return fill(module, plain_names(read_weights(file)), file)


def save_folder(folder: Path, unet, vae, encoder, tokenizer, schedule, dtype=torch.float32) -> None:
    """Write a whole model as a diffusers folder; the text encoder's names get their `text_model.` back. What
    works in half precision and has a `master` is written as that has it, with all its digits."""
    for part, module in (("unet", unet), ("vae", vae), ("text_encoder", encoder)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        prefix = "text_model." if part == "text_encoder" else ""
        held = module.state_dict(keep_vars=True).items()
        tensors = {prefix + k: getattr(t, "master", t).detach().to(dtype) for k, t in held}
        write_tensors(tensors, folder / part / f"{PARTS[part]}.safetensors", {"format": "pt"})
        # else transformers 5 takes the file's dtype and diffusers' plain from_pretrained fails in fp16
        plain = {"dtype": "float32"} if part == "text_encoder" else {}
        write_json(folder / part / "config.json", module.config.to_json() | plain)
    save_tokenizer(tokenizer, folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", schedule.to_json())
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None],
        "feature_extractor": [None, None], "requires_safety_checker": False,
    }  # fmt: skip
    write_json(folder / "model_index.json", index)
