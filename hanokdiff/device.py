"""The device and the precision of all frozen weights."""

import ctypes
import os
import sys

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LARGE = 100_000_000  # parameters of a UNet that is faster in bf16 on a CPU with AMX (docs/LOG.md)


def choose_device(
    device: str | None = None, dtype: str = "auto", parameters: int = 0
) -> tuple[torch.device, torch.dtype, str]:
    """The device (default: the first GPU, else the CPU), the precision of all frozen weights (default: bf16
    on GPUs that have it, and on CPUs with AMX for a UNet of LARGE `parameters`; else fp32), and the reason in
    words."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f'dtype "{dtype}" is not known; choose one of auto, {", ".join(DTYPES)}')
    why = "named" if device else ("the first GPU" if torch.cuda.is_available() else "no CUDA device here")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and WORLD_SIZE > 1:
        device, why = f"cuda:{LOCAL_RANK}", "each process has its own"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f'device "{device}" cannot be used ({reason}); try cpu, or leave it out') from None
    if chosen.type == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    if chosen.type == "cuda" and WORLD_SIZE > 1:
        torch.cuda.set_device(chosen)
    if dtype != "auto":
        return chosen, DTYPES[dtype], f"{chosen} ({why}), {dtype} (named)"
    if chosen.type == "cpu" and parameters >= LARGE and torch.cpu._is_amx_tile_supported():
        faster = f"a UNet of {parameters / 1e6:.0f} M parameters is faster with this CPU's AMX"
        return chosen, torch.bfloat16, f"{chosen} ({why}), bf16 ({faster})"
    if chosen.type != "cuda":
        return chosen, torch.float32, f"{chosen} ({why}), fp32 (fastest and exact there)"
    if torch.cuda.is_bf16_supported():
        return chosen, torch.bfloat16, f"{chosen} ({why}), bf16 (fp32's range at half the memory)"
    return chosen, torch.float32, f"{chosen} ({why}), fp32 (this card has no bf16)"


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory: by default every training step returns it to the system and requests it
    anew, up to a third of the time on a CPU."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library: only slower
        pass
