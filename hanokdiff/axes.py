"""The axes of an X/Y plot, as sample.py --vary names them: "seed=1-4", "cfg=3,5,7", "prompt=barn|tent"."""

import re
from pathlib import Path

NAMES = ("prompt", "seed", "cfg", "steps", "sampler", "strength", "file")
MOST = 64  # values of an axis


def parse(texts: list[str]) -> dict[str, list]:
    """{axis: values} of one or two AXIS=VALUES, between commas (prompt and file: |), or a range."""
    axes: dict[str, list] = {}
    if len(texts) > 2:
        raise ValueError(f"--vary has {len(texts)} axes, but a sheet has two at most")
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().lower()
        if not equals or name not in NAMES:
            known = ", ".join(NAMES)
            raise ValueError(f'--vary "{text}" must be AXIS=VALUES with AXIS one of {known}: cfg=3,5,7')
        if name in axes:
            raise ValueError(f"--vary names {name} twice; give each axis all its values at once")
        axes[name] = [value_of(name, v) for v in split(name, values)]
        if not 2 <= len(axes[name]) <= MOST:
            raise ValueError(f'--vary "{text}": {len(axes[name])} values, but an axis has 2 to {MOST}')
    return axes


def split(name: str, values: str) -> list[str]:
    if name in ("seed", "steps") and (found := re.fullmatch(r"\s*(\d{1,10})\s*-\s*(\d{1,10})\s*", values)):
        first, last = int(found[1]), int(found[2])
        return list(map(str, range(first, min(last, first + MOST) + 1)))
    parts = values.split("|" if name in ("prompt", "file") else ",")
    return [part.strip() for part in parts if part.strip()]


def value_of(name: str, text: str):
    kind = {"seed": int, "steps": int, "cfg": float, "strength": float, "file": Path}.get(name, str)
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f'--vary {name}: "{text}" is not a {"whole " * (kind is int)}number') from None


def label(name: str, value) -> str:
    if name == "file":
        return value.stem if value.stem not in ("lora", "hypernet", "embedding") else value.parent.name
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if name in ("prompt", "sampler") else f"{name} {text}"
