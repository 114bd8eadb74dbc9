"""JSON and text files: read with limits, written to NAME.part first and then renamed, so never half there."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

MAX_JSON_BYTES = 16 << 20  # in memory they become up to 30 times as many
MAX_TEXT_BYTES = 1 << 20  # of a caption or a list


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict:
    """The object in a JSON file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: not a complete model folder in the diffusers layout")
    check_file_size(path, max_bytes)
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes | str, source) -> dict:
    """The object in a JSON text; `source` names the text in messages."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:  # a number of 5000 digits is a ValueError too
        raise ValueError(f"{source} is not valid JSON ({e}); download it again") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{source} holds a {kind}, not a table of names; download it again")
    return content


def read_text(path: str | Path) -> tuple[str, str]:
    """A text file in UTF-8, or else in cp949; and "", or a note that it was cp949."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no text file at {path}")
    check_file_size(path, MAX_TEXT_BYTES)
    content = path.read_bytes()
    with contextlib.suppress(UnicodeDecodeError):
        return content.decode("utf-8-sig"), ""  # Windows' Notepad puts a byte order mark in front
    with contextlib.suppress(UnicodeDecodeError):
        return content.decode("cp949"), "captioned in cp949 instead of UTF-8"  # Korean Windows' "ANSI"
    raise ValueError(f"{path.name!r} is neither UTF-8 nor cp949; save it as UTF-8")


def check_file_size(path: Path, max_bytes: int) -> None:
    if (size := path.stat().st_size) > max_bytes:
        more = f"{path} has {size:,} bytes, more than the {max_bytes:,} that are read"
        raise ValueError(f"{more}; it is no such file")


def what_else(path: Path) -> str:
    """What a file that cannot be read is instead, by its first bytes, if it is one of the usual mistakes."""
    with contextlib.suppress(OSError), open(path, "rb") as f:
        head = f.read(64)
        if head.startswith(b"version https://git-lfs"):
            return "a Git LFS pointer, not the file itself; fetch that with git lfs pull"
        if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
            return "a web page, such as one that asks to log in; open its address in a browser"
        if head[8:9] == b"{" and path.suffix != ".safetensors":
            return "a .safetensors file by what is in it; give its name that ending"
        if head[:2] in (b"PK", b"\x80\x02") and path.suffix == ".safetensors":
            return "what torch.save writes; end its name in .ckpt for a model, else in .pt"
    return ""


def reason(e: Exception) -> str:
    """An exception in one line: a plain ValueError's text, of others the class too: KeyError('betas')."""
    return (getattr(e, "strerror", None) or (str(e) if type(e) is ValueError else repr(e))).split("\n")[0]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield NAME.part to write to, renamed to `path` at the end; if that fails, the old file is as it was."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        sync_rename(part, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # each library has its own error for a full disk
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"{path} cannot be written ({reason(e)}); what was there before is unchanged") from None


def sync_rename(part: Path, path: Path) -> None:
    """Make sure that the bytes are on the disk, then rename in one step."""
    with open(part, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(part, path)


def replace_folder(aside: Path, path: Path) -> None:
    """Give a folder that was written aside its name. What had that name goes away whole, never half."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)  # left by a kill
    if path.exists():
        path.rename(old)
    aside.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str, newline: str | None = None) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline=newline)


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def free_folder(wanted: Path) -> Path:
    """`wanted`, or wanted-2, wanted-3, ... if it exists."""
    folder, n = wanted, 1
    while folder.exists():
        n += 1
        folder = wanted.with_name(f"{wanted.name}-{n}")
    return folder
