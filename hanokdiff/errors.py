"""Errors as one sentence: `report_errors` wraps every command's main. And folders: made, checked, removed.

Imports no torch: `python -m hanokdiff.alert` runs without it.
"""

import contextlib
import functools
import json
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from hanokdiff import lock
from hanokdiff.options import Options

LESS_MEMORY = (
    "--micro-batch 1", "--checkpointing", "a lower --batch-size", "a lower --resolution", "a smaller --size",
    "a lower --beams",
)  # fmt: skip
NO_MEMORY = (  # the last two: cuDNN found no algorithm whose workspace fits
    r"can't allocate memory|out of memory|_STATUS_(ALLOC_FAILED|\w*ALLOCATION_FAILED)|"
    r"Unable to find a valid cuDNN algorithm|FIND was unable to find an engine"
)
notes: list[str] = []  # what this command has warned of
made: list[Path] = []  # folders that this command may have made, the outermost first


def report_errors(main: Callable) -> Callable:
    """Decorate a main(argv): a user's mistake (ValueError, OSError) or a lack of memory is printed to stderr
    as one sentence, with exit code 2; Ctrl-C gives 130. Set HANOKDIFF_DEBUG=1 to see the traceback."""

    @functools.wraps(main)
    def wrapper(argv=None) -> int:
        notes.clear()
        warnings.showwarning = show_note
        # piped on Korean Windows it is cp949, which lacks most of Unicode
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        made.clear()
        Options.names = []
        # tqdm's own is a semaphore of the system's, which a killed process would leave behind
        tqdm.set_lock(threading.RLock())
        try:
            with only_main_process_prints():
                return main(argv) or 0
        except (ValueError, OSError, MemoryError, RuntimeError) as e:
            remove_empty_folders()
            memory, left = is_out_of_memory(e), is_left_alone(e)
            mistake = memory or left or isinstance(e, ValueError | OSError)
            if os.environ.get("HANOKDIFF_DEBUG") or not mistake:
                raise
            text = one_line(memory_message(e) if memory else "another process has ended" if left else e)
            print(f"error: {text}", file=sys.stderr)
            if not left:
                tell_torchrun(text)
            return 2
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        finally:
            lock.release()

    return wrapper


def show_note(message, *_, **__) -> None:
    """A warning in one line, kept for the run's page."""
    notes.append(str(message))
    print(f"note: {message}", file=sys.stderr)


def is_out_of_memory(e: Exception) -> bool:
    """torch.OutOfMemoryError is recognised by its name: no import; on a CPU, and where cuDNN or cuBLAS find
    no room of their own, torch raises RuntimeError."""
    if isinstance(e, MemoryError) or any(c.__name__ == "OutOfMemoryError" for c in type(e).__mro__):
        return True
    return isinstance(e, RuntimeError) and re.search(NO_MEMORY, str(e)) is not None


def is_left_alone(e: Exception) -> bool:
    """Whether another process of this training has ended; that one says why."""
    alone = "WORLD_SIZE" not in os.environ or not isinstance(e, RuntimeError)
    return not alone and bool(re.search("(closed|reset) by peer", str(e)))


def tell_torchrun(text: str) -> None:
    """torchrun prints a traceback of its own and then what it finds in this file: our sentence."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": more}}))


def memory_message(e: Exception) -> str:
    """What was lacking, and which of this command's options take less memory."""
    names = Options.names or " ".join(LESS_MEMORY)
    options = [o for o in LESS_MEMORY if re.search(r"--\S+", o)[0] in names] or ["fewer pictures"]
    way = " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))
    return f"out of memory ({(str(e) or 'no more of it').splitlines()[0].rstrip('.')}); try {way}"


def make_folder(folder: Path, option: str = "--out") -> Path:
    """Make the folder; it is removed again if the command fails before anything is in it."""
    check_folder(folder, option)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_folder(folder: Path, option: str = "--out") -> None:
    """Refuse, before the work, a folder that cannot be made or written into."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir():
        problem = f"cannot be made: {existing} is a file" if missing else "is a file"
        raise ValueError(f"{option} {folder} {problem}; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        read_only = f"{existing.absolute()} is read-only for you"
        raise ValueError(f"{option} {folder} cannot be written: {read_only}; name another folder")
    made.extend(reversed(missing))


def check_file(path: Path, option: str) -> None:
    """Refuse, before the work, a file that is not there."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise ValueError(f"{option}: {what}; name a file that is there")


def remove_empty_folders() -> None:
    """Remove the folders that this command made, if they hold at most the notes of a run without a step."""
    for folder in reversed(made):
        if {f.name for f in folder.glob("*")} <= {"config.json", "class.json", "lock.json"}:
            for file in folder.glob("*.json"):
                file.unlink()
        with contextlib.suppress(OSError):  # it was not made, or has something in it
            folder.rmdir()


def one_line(message: Exception | str) -> str:
    """On one line and without control characters: parts of a message may come from a file."""
    text = re.sub(r"[\s\0-\x1f\x7f-\x9f]+", " ", str(message))
    return text if len(text) <= 1000 else f"{text[:700]} ... {text[-200:]}"


@contextlib.contextmanager
def only_main_process_prints() -> Iterator[None]:
    """Silence torchrun's processes other than 0; an exception is printed by whichever process has it."""
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("RANK", 0)):
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
