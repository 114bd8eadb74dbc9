"""Errors as one sentence: what every command does with a user's mistake, and with folders it made for nothing."""

import contextlib
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hanokdiff.options import Options

SMALLER = (
    "--micro-batch 1",
    "--checkpointing",
    "a lower --batch-size",
    "a lower --resolution",
    "a smaller --size",
    "a lower --beams",
)  # what takes less memory
made: list[Path] = []  # folders that this command may have made, the outermost first


def report_errors(main: Callable) -> Callable:
    """A user's mistake (ValueError) becomes one sentence and exit code 2, never a traceback. To see one anyway, set
    HANOKDIFF_DEBUG=1."""

    @functools.wraps(main)
    def politely(argv=None) -> int:
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        if hasattr(
            sys.stdout, "reconfigure"
        ):  # piped on Korean Windows it is cp949, which lacks most of Unicode
            sys.stdout.reconfigure(errors="backslashreplace")
        made.clear()
        Options.names = []
        try:
            with main_process_speaks():
                return main(argv) or 0
        except (ValueError, OSError, MemoryError, RuntimeError) as e:
            remove_empty_folders()
            if os.environ.get("HANOKDIFF_DEBUG") or not (
                isinstance(e, ValueError | OSError) or out_of_memory(e)
            ):
                raise
            print(f"error: {one_line(ValueError(no_memory(e)) if out_of_memory(e) else e)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130

    return politely


def out_of_memory(e: Exception) -> bool:
    """On a CPU torch says it in a RuntimeError of no kind of its own."""
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or (
        isinstance(e, RuntimeError) and "can't allocate memory" in str(e)
    )


def no_memory(e: Exception) -> str:
    names = Options.names or " ".join(SMALLER)
    helps = [o for o in SMALLER if o[o.index("--") :].split()[0] in names] or ["fewer pictures"]
    reason = (str(e) or "no more of it").splitlines()[0].rstrip(".")
    others = ", ".join(helps[:-1])
    return f"out of memory ({reason}); try {f'{others} or ' if others else ''}{helps[-1]}"


def make_folder(folder: Path, option: str = "--out") -> Path:
    """The folder, made now; what of it was not there goes again if the command fails before anything is in it."""
    check_folder(folder, option)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_folder(folder: Path, option: str = "--out") -> None:
    """Refuse, before the work, a folder that cannot be made or written into."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir():
        raise ValueError(
            f"{option} {folder} cannot be made: {there} is a file; name a folder"
            if missing
            else f"{option} {folder} is a file; name a folder"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{option} {folder} cannot be written: {there.absolute()} is read-only for you; name another "
            "folder"
        )
    made.extend(reversed(missing))


def remove_empty_folders() -> None:
    """After a mistake: no empty folder is left behind, nor the notes of a run that has not taken a step."""
    for folder in reversed(made):
        if {f.name for f in folder.glob("*")} <= {"config.json", "class.json"}:
            for file in folder.glob("*.json"):
                file.unlink()
        with contextlib.suppress(OSError):  # it was not made, or has something in it
            folder.rmdir()


def one_line(e: Exception) -> str:
    """On one line, and nothing in it that a terminal would obey: parts of it may come from a file."""
    text = re.sub(r"[\s\0-\x1f\x7f-\x9f]+", " ", str(e))
    return text if len(text) <= 1000 else f"{text[:700]} ... {text[-200:]}"


@contextlib.contextmanager
def main_process_speaks() -> Iterator[None]:
    """Only process 0 prints; an exception is told by whoever has it."""
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("RANK", 0)):  # of torchrun's processes
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
