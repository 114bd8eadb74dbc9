"""One process at a time in a folder: NAME/lock.json says who, on which machine.

Left by a kill, it is taken over with a notice; of another machine after an hour without a sign of life."""

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from hanokdiff.files import read_json, write_text

STALE = 3600  # seconds without a sign of life, after which another machine's lock is taken over
held: list[Path] = []  # the locks of this process


def take(folder: Path) -> None:
    """Lock an existing folder for this process, or refuse with the owner's name."""
    file = folder.absolute() / "lock.json"
    if file in held:
        return
    me = {"pid": os.getpid(), "machine": socket.gethostname(), "started": started(os.getpid())}
    text = json.dumps(me) + "\n"
    try:
        with open(file, "x", encoding="utf-8") as f:
            f.write(text)
    except FileExistsError:
        owner = {}
        with suppress(ValueError):  # half written by a kill
            owner = read_json(file)
        who = f"process {owner.get('pid')} on {owner.get('machine')}"
        if owner != me and is_alive(owner, file):
            way = f"wait until it ends, or stop it (if there is no such process, delete {file})"
            raise ValueError(f"{folder} is being written by {who}; {way}") from None
        print(f"{folder}: taken over from {who}, which has ended")
        write_text(file, text)
    held.append(file)


def is_alive(owner: dict, file: Path) -> bool:
    """Whether the owner of a lock still runs, as far as this machine can know."""
    here = owner.get("machine") == socket.gethostname()
    pid = owner.get("pid")
    if not here or sys.platform == "win32" or not isinstance(pid, int):
        return here and pid == os.getpid() or bool(owner) and time.time() - file.stat().st_mtime < STALE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return owner.get("started") in (None, started(pid))  # else the number was given out again


def started(pid: int) -> int | None:
    """When a process began, in the system's own count; None where it does not say."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def refresh() -> None:
    """A sign of life, for other machines."""
    for file in held:
        with suppress(OSError):
            os.utime(file)


def release(folder: Path | None = None) -> None:
    """Give back a folder's lock, or all that this process holds."""
    for file in [f for f in held if folder is None or f.parent == folder.absolute()]:
        held.remove(file)
        file.unlink(missing_ok=True)
