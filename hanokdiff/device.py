"""The device and the precision of all frozen weights."""

import ctypes
import os
import sys

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))  # processes on this machine
LARGE = 100_000_000  # parameters of a UNet that is faster in bf16 on a CPU with AMX (docs/LOG.md)


def choose_device(
    device: str | None = None, dtype: str = "auto", training: bool = False, parameters: int = 0
) -> tuple[torch.device, torch.dtype, str]:
    """The device (default: the first GPU, else the CPU), the precision of all frozen weights (default: bf16
    on GPUs that compute in it, and on CPUs with AMX for a UNet of LARGE `parameters`; else fp32, to draw on a
    GPU also fp16: `training` has gradients too small for it), and the reason in words."""
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f'dtype "{dtype}" is not known; choose one of auto, {", ".join(DTYPES)}')
    why = "named" if device else ("the first GPU" if torch.cuda.is_available() else "no CUDA device here")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and WORLD_SIZE > 1:
        device, why = f"cuda:{LOCAL_RANK}", "each process has its own"
    elif device.startswith("cuda:") and LOCAL_WORLD_SIZE > 1:
        one = f"--device {device} is one card, and there are {LOCAL_WORLD_SIZE} processes here"
        raise ValueError(f"{one}; say --device cuda, and each takes its own, or start one process")
    if device.startswith("cuda"):
        use_card(exact=dtype == "fp32")
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
    precision, reason = card_precision(torch.cuda.get_device_capability(chosen), training)
    return chosen, DTYPES[precision], f"{chosen} ({why}), {precision} ({reason})"


def card_precision(capability: tuple[int, int], training: bool) -> tuple[str, str]:
    """The precision that suits a card of this CUDA compute capability, and the reason in words. Before
    Ampere (8.0) torch only emulates bf16, yet calls it supported; Volta and Turing (7.x) are fast in fp16."""
    if capability >= (8, 0):
        return "bf16", "fp32's range at half the memory"
    without = f"compute capability {capability[0]}.{capability[1]} has no bf16"
    if capability >= (7, 0) and not training:
        return "fp16", without
    return "fp32", f"{without}; in fp16 small gradients become 0" if training else without


def use_card(exact: bool) -> None:
    """Settings of torch for CUDA, before anything is on the card. `exact`: fp32 is named, so its products are
    not rounded to TF32's 10 bits; otherwise what stays fp32 beside bf16 is."""
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # pieces of memory that grow: less is lost between tensors where sizes change; read at the first one
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact
    # try cuDNN's algorithms at the first convolution of each shape: the fastest is not the same each time
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """To the device without waiting for it: an ordinary copy waits until a GPU has done all before it."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory: returned and requested anew, it takes up to a third of a CPU's step."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library: only slower
        pass
