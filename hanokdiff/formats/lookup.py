"""The file that a prompt names: <lora:NAME:SCALE>, <hypernet:NAME:SCALE>."""

import difflib
from pathlib import Path

ENDINGS = {"lora": (".safetensors", ".bin"), "hypernet": (".pt",)}


def find_artefact(kind: str, name: str, folder: Path, given: list[Path]) -> Path:
    """The LoRA or hypernetwork called NAME: a file NAME.safetensors (.pt), or the one in a run's folder NAME,
    among the files given on the command line and everything in `folder`."""
    found: dict[str, list[Path]] = {}
    files = [f for f in given if f.suffix in ENDINGS[kind]]
    files += (
        [f for f in sorted(folder.rglob("*")) if f.suffix in ENDINGS[kind] and f.is_file()]
        if folder.is_dir()
        else []
    )
    for file in dict.fromkeys(files):
        found.setdefault(file.stem, []).append(file)
        if file.stem == kind:  # runs/NAME/lora.safetensors
            found.setdefault(file.parent.name, []).append(file)
    if len(found.get(name, [])) == 1:
        return found[name][0]
    if name in found:
        raise ValueError(
            f"<{kind}:{name}>: there are {len(found[name])} of that name ({found[name][0]}, "
            f"{found[name][1]}, ...); rename one, or name another --lora-dir"
        )
    near = difflib.get_close_matches(name, found, 1, 0.5)
    advice = f"the nearest is {near[0]}" if near else f"there is {', '.join(sorted(found)[:5]) or 'none'}"
    raise ValueError(f"<{kind}:{name}>: no such file in {folder}; {advice}, or name another --lora-dir")
