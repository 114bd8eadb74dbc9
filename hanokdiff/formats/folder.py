"""Whole models on disk: the folder layout of diffusers, read and written (one file for all: see
single_file.py).

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/

Each network is built on the meta device (no memory, no random numbers) and its tensors are mapped from the
file. Whatever is missing, left over or of the wrong shape is an error that names it: a checkpoint never loads
halfway.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from hanokdiff.files import read_json, reason, write_json
from hanokdiff.formats.tensors import read_tensors, write_tensors
from hanokdiff.formats.tokenizer import save_tokenizer
from hanokdiff.formats.validate import check_names

# VAEs published in 2022
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PARTS = {  # folder -> file name without its ending, as diffusers and transformers write it
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
ERRORS = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)
SINGLE_FILES = (".safetensors", ".ckpt")  # what single_file.py reads


def find_model(model: str) -> Path:
    """The folder or single file of a model: a local one, else a hub id ("owner/name") from the cache or the
    hub."""
    if not model.strip():
        raise ValueError(
            'the model is ""; give a folder with model_index.json, a single file, a hub id, or "tiny"'
        )
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix in SINGLE_FILES:
        return path
    if path.exists():
        raise ValueError(
            f"{model} is a file, but not a {' or '.join(SINGLE_FILES)}; give one of these, or a model "
            "folder (one that holds model_index.json)"
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(
            f'no model folder at "{model}"; give a folder with model_index.json, a single file '
            f'({", ".join(SINGLE_FILES)}), a hub id, or "tiny"'
        )
    # only here and for tokenizers: nothing else may touch the network
    from huggingface_hub import snapshot_download

    wanted = [
        "model_index.json",
        "*/config.json",
        "scheduler/*",
        "tokenizer/*",
        "unet/*model*.safetensors",
        "vae/*model*.safetensors",
        "text_encoder/*model*.safetensors",
    ]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as e:  # offline, unknown id, no permission: the hub has a class for each
        reason = str(e).strip().split("\n")[0]
        raise ValueError(
            f'no folder "{model}" here, nor from the hub ({reason}); name a local folder'
        ) from None


def read_config(path: Path, config: type, what: str):
    """A config class filled from its JSON file."""
    c = read_json(path)
    try:
        return config.from_json(c)
    except ERRORS as e:
        raise ValueError(f"{path} does not describe {what} ({reason(e)})") from None


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


def fill(
    module: nn.Module, tensors: dict[str, Tensor], source: Path, asker: str = "config.json"
) -> nn.Module:
    """Give a module built on the meta device its tensors; every name and shape must match."""
    own = module.state_dict()
    check_names(own, tensors, source, "the file does not belong to the config.json beside it")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, but {asker} asks for "
                f"{tuple(own[name].shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"{source}: {name} is {tensor.dtype}; only weights in floating point can be used"
            )
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
    file = weights_file(folder / part, PARTS[part])
    return fill(module, plain_names(read_tensors(file)), file)


def save_folder(
    folder: Path, unet, vae, encoder, tokenizer, schedule, dtype: torch.dtype = torch.float32
) -> None:
    """Write a whole model as a diffusers folder; the text encoder's names get their `text_model.` back. What
    works in half precision and has a `master` is written as that has it, with all its digits."""
    for part, module in (("unet", unet), ("vae", vae), ("text_encoder", encoder)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        prefix = "text_model." if part == "text_encoder" else ""
        held = {
            prefix + k: getattr(t, "master", t).detach() for k, t in module.state_dict(keep_vars=True).items()
        }
        tensors = {k: t.to(dtype) for k, t in held.items()}
        write_tensors(tensors, folder / part / f"{PARTS[part]}.safetensors", {"format": "pt"})
        write_json(folder / part / "config.json", module.config.to_json())
    save_tokenizer(tokenizer, folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", schedule.to_json())
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    write_json(folder / "model_index.json", index)
