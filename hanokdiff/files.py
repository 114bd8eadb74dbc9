"""Small files: JSON and text read with care, every file written aside and then renamed."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


def read_json(path: Path, most: int = 16 << 20) -> dict:
    """The table in a JSON file of at most so many bytes: in memory they become up to 30 times as many."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: not a complete model folder in the diffusers layout")
    check_file_size(path, most)
    return parse_json(path.read_bytes(), path)


def check_file_size(path: Path, most: int) -> None:
    if (size := path.stat().st_size) > most:
        raise ValueError(
            f"{path} has {size:,} bytes, more than the {most:,} that are read; it is no such file"
        )


def parse_json(text: bytes | str, source) -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:  # a number of 5000 digits is a ValueError too
        raise ValueError(f"{source} is not valid JSON ({e}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{source} holds a {type(content).__name__}, not a table of names; download it again"
        )
    return content


def reason(e: Exception) -> str:
    """An exception in one line; ours speak for themselves, Python's need their name: KeyError('betas')."""
    return (getattr(e, "strerror", None) or (str(e) if type(e) is ValueError else repr(e))).split("\n")[0]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside this one to write to, which then takes its name; if that fails, the old file is as it was."""
    aside = path.with_name(path.name + ".part")
    try:
        yield aside
        sync_rename(aside, path)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as e:  # of a full disk each library says it in its own way
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


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def free_folder(wanted: Path) -> Path:
    """`wanted`, or wanted-2, wanted-3, ... if it is taken."""
    out, n = wanted, 1
    while out.exists():
        n += 1
        out = wanted.with_name(f"{wanted.name}-{n}")
    return out


MOST_TEXT = 1 << 20  # bytes of a caption or a list at most


def read_text(path: str | Path) -> tuple[str, str]:
    """A text file in UTF-8, or else in cp949 and a note that it was."""
    if not Path(path).is_file():
        raise ValueError(f"no text file at {path}")
    check_file_size(Path(path), MOST_TEXT)
    raw, note = Path(path).read_bytes(), ""
    try:
        text = raw.decode("utf-8-sig")  # Windows' Notepad puts a byte order mark in front
    except UnicodeDecodeError:
        note = "captioned in cp949 instead of UTF-8"  # what Korean Windows calls ANSI
        try:
            text = raw.decode("cp949")
        except UnicodeDecodeError:
            raise ValueError(f"{Path(path).name!r} is neither UTF-8 nor cp949; save it as UTF-8") from None
    return text, note
