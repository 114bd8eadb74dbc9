"""Opening a model with transformers, from a folder or the hub, so that a file in it can do no harm."""

import math
from pathlib import Path

import torch

from hanokdiff.files import read_json

MOST_LAYERS, MOST_NUMBER = 200, 1_000_000  # of a config.json; larger ones exhaust the memory


def open_pretrained(model: str | Path, kind: str, tokenizer: str, option: str, whole: str, example: str):
    """(model, tokenizer) of transformers' classes `kind` and `tokenizer`: from a folder, else from the hub.

    Classes are given by name because importing transformers takes seconds. ValueError if the model cannot be
    opened or lacks weights, which transformers would leave random; its message names the command's `option`,
    what a folder must hold (`whole`), and a hub id that works."""
    folder, name = Path(model).expanduser(), str(model)
    local = folder.is_dir()
    if not local and (isinstance(model, Path) or folder.exists() or not could_be_hub_id(name)):
        what = "not a folder" if folder.exists() else "no such folder"
        way = f"give one that holds {whole}, or a hub id such as {example}"
        raise ValueError(f"{option} {name}: {what}; {way}")
    import transformers

    transformers.utils.logging.set_verbosity_error()  # else a table of loaded keys, and advice on long texts
    if local:
        transformers.utils.logging.disable_progress_bar()
    try:
        network_class, tokenizer_class = getattr(transformers, kind), getattr(transformers, tokenizer)
        if local:
            check_model_folder(folder, network_class)
        how = dict(local_files_only=local, output_loading_info=True, ignore_mismatched_sizes=True)
        network, info = network_class.from_pretrained(str(folder), **how)
        words = tokenizer_class.from_pretrained(str(folder), local_files_only=local, trust_remote_code=False)
        words("a b")  # a damaged tokenizer may fail only here
    except Exception as e:  # offline, unknown id, JSON, safetensors: each raises a class of its own
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip(".")
        where = "the folder cannot be opened" if local else "no folder here, nor a model from the hub"
        online = "" if local else ", or go online once"
        raise ValueError(f"{option} {name}: {where} ({reason}); name a folder with {whole}{online}") from None
    bad = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if bad:
        lacks = f"{len(bad)} tensors missing or misshapen, such as {bad[0]}"
        raise ValueError(f"{option} {name} is not {whole}: {lacks}; give a complete one, such as {example}")
    return network, words


def could_be_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def parts_of(index: Path) -> list[str]:
    """The names of the files, beside this index of theirs, that hold a network's weights in parts."""
    parts = read_json(index).get("weight_map")
    names = list(parts.values()) if isinstance(parts, dict) else [None]
    if not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise ValueError(f"{index} names no files beside it in weight_map; fetch it again")
    return sorted(set(names))


def check_model_folder(folder: Path, kind: type) -> None:
    """Refuse a folder that names files elsewhere, or whose config.json asks for more weights than it has."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise ValueError(f"{adapter} names another model; give a folder with the whole one")
    for index in folder.glob("*.index.json"):
        parts_of(index)
    config = read_json(folder / "config.json")
    check_numbers(config, folder / "config.json")
    with torch.device("meta"):  # allocates nothing
        weights = sum(p.numel() for p in kind(kind.config_class.from_dict(config)).parameters())
    size = sum(f.stat().st_size for end in ("safetensors", "bin") for f in folder.glob(f"*.{end}"))
    if weights > size:
        raise ValueError(f"config.json asks for {weights:,} weights, but the files hold {size:,} bytes")


def check_numbers(config: dict, path: Path) -> None:
    for name, value in config.items():
        if isinstance(value, dict):
            check_numbers(value, path)
        elif isinstance(value, int | float):
            most = MOST_LAYERS if "layers" in name else MOST_NUMBER
            if math.isnan(value) or abs(value) > most:
                raise ValueError(f"{path}: {name} is {str(value)[:40]}, which no model has")
