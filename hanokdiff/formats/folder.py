"""Whole models on disk: the folder layout of diffusers, read and written (one file for all: see singlefile.py).

    model_index.json  unet/  vae/  text_encoder/  tokenizer/  scheduler/

Each network is built on the meta device (no memory, no random numbers) and its tensors are mapped from the file.
Whatever is missing, left over or of the wrong shape is an error that names it: a checkpoint never loads halfway.
"""

import contextlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # VAEs published in 2022
PARTS = {  # folder -> file name without its ending, as diffusers and transformers write it
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
ERRORS = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)
SINGLE_FILES = (".safetensors", ".ckpt")  # what singlefile.py reads
HUB_TOKENIZERS = {  # the same words in all three; a single file brings none
    "sd1": ["openai/clip-vit-large-patch14"],
    "sd2": ["stabilityai/stable-diffusion-2-1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            "openai/clip-vit-large-patch14"],
}  # fmt: skip


def find(model: str) -> Path:
    """The folder or single file of a model: a local one, else a hub id ("owner/name") from the cache or the hub."""
    if not model.strip():
        raise ValueError('the model is ""; give a folder with model_index.json, a single file, a hub id, or "tiny"')
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix in SINGLE_FILES:
        return path
    if path.exists():
        raise ValueError(f"{model} is a file, but not a {' or '.join(SINGLE_FILES)}; give one of these, or a model "
                         "folder (one that holds model_index.json)")  # fmt: skip
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f'no model folder at "{model}"; give a folder with model_index.json, a single file '
                         f'({", ".join(SINGLE_FILES)}), a hub id, or "tiny"')  # fmt: skip
    from huggingface_hub import snapshot_download  # only here and for tokenizers: nothing else may touch the network

    wanted = ["model_index.json", "*/config.json", "scheduler/*", "tokenizer/*", "unet/*model*.safetensors",
              "vae/*model*.safetensors", "text_encoder/*model*.safetensors"]  # fmt: skip
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as e:  # offline, unknown id, no permission: the hub has a class for each
        reason = str(e).strip().split("\n")[0]
        raise ValueError(f'no folder "{model}" here, nor from the hub ({reason}); name a local folder') from None


def read_json(path: Path, most: int = 16 << 20) -> dict:
    """The table in a JSON file of at most so many bytes: in memory they become up to 30 times as many."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: not a complete model folder in the diffusers layout")
    check_size(path, most)
    return parse_json(path.read_bytes(), path)


def check_kind(folder: Path) -> None:
    """Whether a model folder is of Stable Diffusion 1 or 2, by the parts that model_index.json names."""
    index = folder / "model_index.json"
    if not index.is_file():
        inner = [file.parent for file in sorted(folder.glob("*/model_index.json"))]
        raise ValueError(f"{index} is missing: not a model folder in the diffusers layout; name "
                         f"{inner[0] if inner else 'the folder that holds it'}")  # fmt: skip
    index = read_json(index)
    for part in ("text_encoder_2", "transformer", "prior"):
        if index.get(part) not in (None, [None, None]):
            raise ValueError(f"{folder} is a {str(index.get('_class_name'))[:60]}, a model with a {part} (such as SDXL "
                             "or SD 3); only Stable Diffusion 1.x and 2.x are supported")  # fmt: skip


def check_size(path: Path, most: int) -> None:
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size:,} bytes, more than the {most:,} that are read; it is no such file")


def parse_json(text: bytes | str, source) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:  # a number of 5000 digits is a ValueError too
        raise ValueError(f"{source} is not valid JSON ({e}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds a {type(content).__name__}, not a table of names; download it again")
    return content


def read_config(path: Path, config: type, what: str):
    """A config class filled from its JSON file."""
    c = read_json(path)
    try:
        return config.from_json(c)
    except ERRORS as e:
        raise ValueError(f"{path} does not describe {what} ({reason(e)})") from None


def reason(e: Exception) -> str:
    """An exception in one line; ours speak for themselves, Python's need their name: KeyError('betas')."""
    return (getattr(e, "strerror", None) or (str(e) if type(e) is ValueError else repr(e))).split("\n")[0]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file (memory-mapped) or of a .bin file (read without running code)."""
    if path.suffix != ".safetensors":
        return read_pickle(path)
    return read_safetensors(path, "model")[0]


def read_safetensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped) and metadata. The library refuses headers that promise more than the file holds."""
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
            raise RuntimeError(f"{packed[0].filename} in it is compressed, which torch never does")  # may be a bomb
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        check_tensors(content, path.stat().st_size)
        return content
    except Exception as e:  # a damaged pickle can fail in any way
        calls = re.search(r"GLOBAL (\S+)|persistent_load|[Cc]an only \w+", str(e))
        if calls is None or not isinstance(e, UnpicklingError):
            raise damaged(path, e) from None
        raise ValueError(f"{path} needs more than tensors ({calls[1] or calls[0]}); that could be any code, so it was "
                         f"not run: get this {what} as .safetensors, or convert it where you trust it") from None


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
        elif isinstance(x, Tensor) and (x.layout != torch.strided or x.device.type != "cpu" or x.nbytes > size):
            raise RuntimeError(f"a tensor of shape {tuple(x.shape)} on {x.device} is not in the file")


def whole(x) -> int:
    """A whole number that some file holds as one or as text; 0 if it is something else."""
    return int(x) if isinstance(x, int) or (isinstance(x, str) and x.isdecimal() and len(x) < 20) else 0


def finite(t: Tensor) -> bool:
    """Whether every number is; by way of float32, since torch does not compare 8-bit ones."""
    return bool(torch.isfinite(t.float()).all())


def damaged(path: Path, e: Exception) -> ValueError:
    reason = (str(e) if len(str(e)) > 3 else repr(e)).split("\n")[0].split(". ")[0]  # of a KeyError all is "a"
    reason = "it is empty" if path.is_file() and not path.stat().st_size else reason
    return ValueError(f"{path} cannot be read ({reason}); it is damaged or incomplete, fetch it again")


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str], int | None]:
    """A single file's tensors, its metadata (.safetensors), and the training step that it tells (.ckpt)."""
    if path.suffix == ".safetensors":
        return *read_safetensors(path, "model"), None
    held = read_pickle(path)
    tensors, step = held.get("state_dict", held), held.get("global_step")
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: its state_dict is a {type(tensors).__name__}, not a table of tensors")
    tensors = {k: t for k, t in tensors.items() if isinstance(k, str) and isinstance(t, Tensor)}
    return tensors, {}, step if isinstance(step, int) else None


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


def check_names(asked: Iterable[str], held: Iterable[str], source: Path, hint: str) -> None:
    """Every tensor that is asked for must be there, and none besides."""
    asked, held = set(asked), set(held)
    missing, extra = sorted(asked - held), sorted(held - asked)
    if missing or extra:
        what = [f"{len(names)} {kind} (such as {names[0]})" for kind, names in
                (("missing", missing), ("left over", extra)) if names]  # fmt: skip
        matched = f"{len(asked) - len(missing)} of {len(asked)} tensors matched"
        raise ValueError(f"{source}: {matched}, {', '.join(what)}; {hint}")


def fill(module: nn.Module, tensors: dict[str, Tensor], source: Path, asker: str = "config.json") -> nn.Module:
    """Give a module built on the meta device its tensors; every name and shape must match."""
    own = module.state_dict()
    check_names(own, tensors, source, "the file does not belong to the config.json beside it")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{source}: {name} has shape {tuple(tensor.shape)}, but {asker} asks for "
                             f"{tuple(own[name].shape)}")  # fmt: skip
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {name} is {tensor.dtype}; only weights in floating point can be used")
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval()


def check_fit(unet, text, source) -> None:
    """Whether the configs of UNet and text encoder make one Stable Diffusion."""
    if unet.in_channels != 4:
        raise ValueError(f"{source}: the UNet takes {unet.in_channels} channels, not 4: inpainting and pix2pix "
                         "models are not supported")  # fmt: skip
    if text.hidden_size != unet.cross_attention_dim:
        raise ValueError(f"{source}: the text encoder is {text.hidden_size} wide, but the UNet listens to "
                         f"{unet.cross_attention_dim}")  # fmt: skip


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


def load_tokenizer(folder: Path, pad: str | None = None):
    """The library's CLIP tokenizer: vocab.json and merges.txt, or the tokenizer.json that transformers 5 writes.
    `pad` is another token to pad prompts with than the folder says."""
    if not has_tokenizer(folder):
        name = "merges.txt" if (folder / "vocab.json").is_file() else "vocab.json"
        raise ValueError(f"{folder / name} is missing: not a complete model folder in the diffusers layout; fetch it "
                         "again, or name another tokenizer with --tokenizer")  # fmt: skip
    from transformers import CLIPTokenizer  # lazily: half a second that --help need not wait for

    for file in folder.glob("*.[jt]*"):
        check_size(file, 64 << 20)
    config = folder / "tokenizer_config.json"
    held = read_json(config) if config.is_file() else {}
    if away := [k for k in ("vocab_file", "merges_file", "tokenizer_file") if held.get(k)]:
        raise ValueError(f"{config} names another file ({away[0]}), but only the folder's own are read: delete that")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **({"pad_token": pad} if pad else {}))
        ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, *tokenizer("a b").input_ids]
    except BaseException as e:  # the library raises what it comes upon, and its Rust half a BaseException
        if isinstance(e, KeyboardInterrupt):
            raise
        raise ValueError(f"{folder} holds no CLIP tokenizer that can be read ({reason(e)}); fetch it again") from None
    if not all(isinstance(i, int) for i in ids):
        raise ValueError(f"{folder}: the tokenizer has no begin, end or padding token; fetch it again")
    return tokenizer


def check_pretrained(folder: Path, kind: type) -> None:
    """Before transformers opens a folder: no name in it leads elsewhere, and its weights can fill what it describes."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder / 'adapter_config.json'} names another model; give a folder with the whole one")
    for index in folder.glob("*.index.json"):
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise ValueError(f"{index} names files that are not in its folder; fetch it again")
    config = read_json(folder / "config.json")
    todo = [*config.items()]
    while todo:
        name, x = todo.pop()
        todo += x.items() if isinstance(x, dict) else ()
        if isinstance(x, int | float) and not abs(x) <= (200 if "layers" in name else 1_000_000):
            raise ValueError(f"{folder / 'config.json'}: {name} is {str(x)[:40]}, which no model has")
    with torch.device("meta"):
        asked = sum(p.numel() for p in kind(kind.config_class.from_dict(config)).parameters())
    size = sum(f.stat().st_size for end in ("safetensors", "bin") for f in folder.glob(f"*.{end}"))
    if asked > size:
        raise ValueError(f"config.json asks for {asked:,} weights, but the files hold {size:,} bytes")


def has_tokenizer(folder: Path) -> bool:
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return pair or (folder / "tokenizer.json").is_file()


def find_tokenizer(named: str | None, beside: Path, vocabulary: int, sd2: bool):
    """The tokenizer of a model that brings none: the named folder or hub id, else one beside the model, else the
    published one from the cache or the hub. SD 2 pads prompts with "!", SD 1 with the end token."""
    names = [named] if named else [str(beside), *HUB_TOKENIZERS["sd2" if sd2 else "sd1"]]
    tried = (tokenizer_folder(name, cached) for cached in (True, False) for name in names)
    folder = next((f for f in tried if f), None)
    if folder is None:
        raise ValueError(f"no tokenizer in {', nor in '.join(names)} (a folder with vocab.json and merges.txt, or a "
                         "hub id); name one with --tokenizer FOLDER_OR_HUB_ID")  # fmt: skip
    return check_tokenizer(load_tokenizer(folder, "!" if sd2 else "<|endoftext|>"), folder, vocabulary)


def check_tokenizer(tokenizer, folder: Path, vocabulary: int):
    count = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if count > vocabulary:
        raise ValueError(f"the tokenizer in {folder} knows {count} tokens, the text encoder {vocabulary}: it "
                         "belongs to another model; name the right one with --tokenizer")  # fmt: skip
    return tokenizer


def tokenizer_folder(name: str, cached: bool) -> Path | None:
    """Where the tokenizer of a local folder, or of a hub id (from the cache, else from the network), lies."""
    folder = Path(name).expanduser()
    if not folder.exists():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            return None
        from huggingface_hub import snapshot_download

        files = ["vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json"]
        try:
            patterns = [*files, *(f"tokenizer/{f}" for f in files)]
            folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=cached))
        except Exception:  # not in the cache, offline, unknown id, no permission: the hub has a class for each
            return None
    return next((place for place in (folder / "tokenizer", folder) if has_tokenizer(place)), None)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file aside, sync it, then rename it: what was there stays whole until then."""
    for name, tensor in tensors.items():
        # the extremes are NaN if any value is; isfinite on all of them takes 30 times as long on a CPU
        if tensor.is_floating_point() and tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
            raise ValueError(f"{path} was not written: {name} has a value that is not finite; lower the learning rate")
    tensors = {k: t.detach().contiguous().cpu() for k, t in tensors.items()}
    with replacing(path) as aside:
        save_file(tensors, aside, metadata)
        os.umask(mask := os.umask(0))
        os.chmod(aside, 0o666 & ~mask)  # safetensors makes it readable for its owner only


def write_pt(content: dict, path: Path) -> None:
    """Write a .pt that the WebUI accepts: plain containers and tensors in torch's older container. Its checker refuses
    the members that torch.save adds to the newer one since 2.x."""
    with replacing(path) as aside:
        torch.save(content, aside, _use_new_zipfile_serialization=False)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside this one to write to, which then takes its name; if that fails, the old file is as it was."""
    aside = path.with_name(path.name + ".part")
    try:
        yield aside
        sync_rename(aside, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # of a full disk each library says it in its own way
        with contextlib.suppress(OSError):
            aside.unlink()
        raise OSError(f"{path} cannot be written ({reason(e)}); what was there before is unchanged") from None


def write_text(path: Path, text: str, newline: str | None = None) -> None:
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", newline=newline)


def sync_rename(aside: Path, path: Path) -> None:
    """Make sure the bytes are on the disk, then put the file in its place in one step."""
    with open(aside, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(aside, path)


def save_folder(folder: Path, unet, vae, encoder, tokenizer, schedule, dtype: torch.dtype = torch.float32) -> None:
    """Write a whole model as a diffusers folder; the text encoder's names get their `text_model.` back. What works in
    half precision and has a `master` is written as that has it, with all its digits."""
    for part, module in (("unet", unet), ("vae", vae), ("text_encoder", encoder)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        prefix = "text_model." if part == "text_encoder" else ""
        held = {prefix + k: getattr(t, "master", t).detach() for k, t in module.state_dict(keep_vars=True).items()}
        tensors = {k: t.to(dtype) for k, t in held.items()}
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
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part", dir=folder) as aside:
        try:
            tokenizer.save_pretrained(aside)
        except Exception as e:  # the library's Rust half has no OSError
            raise OSError(f"{folder} cannot be written ({reason(e)})") from None
        for file in Path(aside).iterdir():
            sync_rename(file, folder / file.name)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(m if isinstance(m, str) else " ".join(m) for m in merges), ""]
    write_text(folder / "merges.txt", "\n".join(lines))
    vocab = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
