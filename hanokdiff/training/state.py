"""A run's state on disk: what is written so that a run can be resumed, and how it is read back.

config.json     what the run was started with
log.jsonl       a line every ten steps
state/NNNNNN.pt the trained parameters, AdamW's moments, the step; the newest two, each with checksums
"""

import json
import math
import zipfile
from pathlib import Path

import torch

from hanokdiff.files import read_json, replacing, write_text

# change results by rounding at most
HARMLESS = ("device", "deterministic", "checkpointing", "compile", "save_every", "preview_every")


def state_files(out: Path) -> list[Path]:
    """The saved states, newest first: each was written aside, synced and renamed, so none is half written."""
    return sorted((out / "state").glob("[0-9]*.pt"), key=lambda f: (len(f.name), f.name), reverse=True)


def delete_states(out: Path, keep: Path | None = None) -> None:
    for file in (out / "state").glob("[0-9]*.pt*"):  # with what a kill left half written
        if file != keep:
            file.unlink(missing_ok=True)


def write_state(out: Path, step: int, state: dict, keep: Path | None) -> Path:
    """Write state/STEP.pt. `keep` is the state before it, which stays, should the disk damage one."""
    file = out / "state" / f"{step:06d}.pt"
    file.parent.mkdir(exist_ok=True)
    delete_states(out, keep)
    with replacing(file) as aside:
        torch.save(state, aside)
    return file


def read_state(file: Path, device) -> dict:
    """A saved state. Its checksums are compared first: torch itself would not notice a flipped bit."""
    try:
        with zipfile.ZipFile(file) as z:
            if broken := z.testzip():
                raise ValueError(f"{broken} in it is not what was written")
        return torch.load(file, map_location=device, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise  # the file is not to blame
    except Exception as e:  # torch has an exception for each kind of damage
        reason = str(e).split("\n")[0] or type(e).__name__
        raise ValueError(f"{file} cannot be read ({reason})") from None


def newest_state(out: Path, device) -> tuple[Path, dict] | None:
    """The newest state that can be read, and its file; None if none was saved yet."""
    damage = ""
    for file in state_files(out):
        try:
            return file, read_state(file, device)
        except ValueError as e:
            damage = damage or str(e)
            print(f"{e}; trying the one before it")
    if damage:
        raise ValueError(f"{damage}, nor any before it; start again without --resume")
    return None


def check_config(out: Path, config: dict, force: bool) -> bool:
    """Refuse to resume with other options; with `force`, print them. Returns whether any differ."""
    changed = "; ".join(differences(read_json(out / "config.json"), config))
    if changed and not force:
        way = "undo that, accept it with --force, or start a new one without --resume"
        raise ValueError(f"{out}: {changed}: another run cannot go on from there; {way}")
    if changed:
        print(f"--force: {changed}; what was trained until now was trained with the former")
    return bool(changed)


def differences(before: dict, now: dict) -> list[str]:
    """Each option that can change a result and is not what a run's config.json says."""
    now = json.loads(json.dumps(now))  # as it comes back from a file: lists for tuples
    changed = [k for k, v in now.items() if k not in HARMLESS and before.get(k) != v]
    return [f"{k} was {str(before.get(k))[:60]} and is now {str(now[k])[:60]}" for k in changed]


def truncate_log(out: Path, step: int) -> None:
    """Drop the lines after a step, which a resumed run writes again."""
    log = out / "log.jsonl"
    if log.exists():
        rows = [r for r in log.read_text("utf-8", "replace").splitlines() if step_of(r) <= step]
        write_text(log, "".join(r + "\n" for r in rows))


def step_of(line: str) -> float:
    """The step of a line of the log; infinity for a damaged line, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
