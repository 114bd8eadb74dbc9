"""The file that a prompt names: <lora:NAME:SCALE>, <hypernet:NAME:SCALE>."""

import difflib
from pathlib import Path

ENDINGS = {"lora": (".safetensors", ".bin"), "hypernet": (".pt",)}


def find_artefact(kind: str, name: str, folder: Path, given: list[Path]) -> Path:
    """The LoRA or hypernetwork called NAME, of the files given and those in `folder`: NAME.safetensors (.pt),
    or the one in a run's folder NAME, as runs/NAME/lora.safetensors."""
    inside = sorted(folder.rglob("*")) if folder.is_dir() else []
    found: dict[str, list[Path]] = {}
    for file in dict.fromkeys([*given, *inside]):
        if file.suffix in ENDINGS[kind] and file.stem != "embedding" and (file in given or file.is_file()):
            found.setdefault(file.parent.name if file.stem == kind else file.stem, []).append(file)
    if len(found.get(name, [])) == 1:
        return found[name][0]
    if name in found:
        several = f"there are {len(found[name])} of that name ({found[name][0]}, {found[name][1]}, ...)"
        raise ValueError(f"<{kind}:{name}>: {several}; rename one, or name another --lora-dir")
    near = difflib.get_close_matches(name, found, 1, 0.5)
    advice = f"the nearest is {near[0]}" if near else f"there is {', '.join(sorted(found)[:5]) or 'none'}"
    raise ValueError(f"<{kind}:{name}>: no such file in {folder}; {advice}, or name another --lora-dir")
