"""What is looked at before transformers opens a model folder."""

from pathlib import Path

import torch

from hanokdiff.files import read_json


def check_pretrained(folder: Path, kind: type) -> None:
    """Before transformers opens a folder: no name in it leads elsewhere, and its weights can fill what it describes."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder / 'adapter_config.json'} names another model; give a folder with the whole one"
        )
    for index in folder.glob("*.index.json"):
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(
            isinstance(n, str) and Path(n).name == n for n in names.values()
        ):
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
