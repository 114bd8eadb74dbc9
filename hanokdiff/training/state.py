"""A run's state on disk."""

import json
import math
import zipfile
from pathlib import Path

import torch
from torch import nn

HARMLESS = ("device", "checkpointing", "compile", "save_every", "preview_every")  # change no result but by rounding


def fp32_master(p: nn.Parameter) -> nn.Parameter:
    """What learns in half precision learns as a copy in fp32: steps of 1e-6 would be rounded away. It is left with the
    parameter, for whoever saves the model."""
    if p.dtype == torch.float32:
        return p
    p.master = getattr(p, "master", p).detach().to(p.device, torch.float32, copy=True)
    return nn.Parameter(p.master)


def differences(before: dict, now: dict) -> list[str]:
    """All that is other than a run's config.json says, of what can change a run."""
    now = json.loads(json.dumps(now))  # as it comes back from a file: lists for tuples
    return [f"{k} was {str(before.get(k))[:60]} and is now {str(v)[:60]}" for k, v in now.items()
            if k not in HARMLESS and before.get(k) != v]  # fmt: skip


def read_state(file: Path, device) -> dict:
    """A saved state; torch itself would not notice a flipped bit."""
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


def step_of(line: str) -> float:
    """The step of a line of the log; of a damaged one, which is written again, none that was reached."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
