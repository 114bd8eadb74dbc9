"""Time and peak memory of training steps and pictures, in hanokdiff and in the baseline (diffusers)."""

import contextlib
import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hanokdiff.bench import setup
from hanokdiff.device import choose_device
from hanokdiff.formats.load import TINY_MODEL
from hanokdiff.models import memory
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.training.trainer import Trainer

FIRST_STEP = {  # side -> the code of a process that loads the embedded model and does one sampling step
    "ours": "from hanokdiff.formats.load import load_model; next(load_model().sample(['a house'], [0]))",
    "diffusers": f"from hanokdiff.bench import baseline; baseline.first_step({str(TINY_MODEL)!r})",
}


# ----------------------------------------------------------------------------- what is measured, step by step


def train(sd: StableDiffusion, method: str, side: int, batch: int, folder: Path) -> Iterator[None]:
    """Our training of a method in a whole Trainer: one step at every next()."""
    trainable, losses = setup.prepare(sd, method, side)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        options = dict(steps=10**6, batch_size=batch, lr=1e-5, save=None, artefact="", config={})
        trainer = Trainer(folder / method, trainable, **options)
        batches = iter(trainer)
        part = next(batches)
    for number, handler in handlers.items():
        signal.signal(number, handler)  # the Trainer's own would save a state before it stops
    while True:
        trainer.backward(losses(part))
        yield
        part = next(batches)


def sample(
    sd: StableDiffusion, side: int, batch: int, prompt: str = "a house in the snow", attend: tuple = ()
) -> Iterator[None]:
    """Our sampler, from the prompt to the latents: `batch` pictures of STEPS steps at every next()."""
    how = dict(sampler="ddim", steps=setup.STEPS, cfg=7.5, size=(side, side), attend=attend)
    while True:
        for _ in sd.sample([prompt] * batch, list(range(batch)), **how):
            pass
        yield


def import_baseline():
    """hanokdiff.bench.baseline, which needs diffusers and peft: not dependencies of hanokdiff."""
    try:
        from hanokdiff.bench import baseline
    except ImportError as e:
        hint = "pip install -r requirements-dev.txt"
        raise ValueError(f"--vs diffusers needs both sides: {hint} ({e})") from None
    return baseline


def build_sides(
    args: Namespace, work: str, folder: Path, only: str | None = None
) -> dict[str, Iterator[None]]:
    """Name of a side -> iterator that does one step of `work` at every next(). Its files go into `folder`."""
    dtype, sides = choose_device(args.device, args.dtype)[1], {}

    def build():
        sd = setup.build(args.size, args.device, dtype)
        if args.channels_last:
            sd.unet.to(memory_format=torch.channels_last)
        return sd

    if only in (None, "ours"):
        sd = build()
        if work.startswith("sample"):
            sides["ours"] = sample(sd, args.side, args.batch, *setup.SAMPLED.get(work, ()))
        else:
            sides["ours"] = train(sd, work, args.side, args.batch, folder)
        if args.compile:
            memory.compile(sd.unet)
        if args.checkpointing:
            memory.checkpoint(sd.unet)
    if (
        args.vs and not work.startswith("hypernet") and work not in (*setup.RECIPES, *setup.SAMPLED)
    ):  # no such script there
        baseline = import_baseline()
        for kind in baseline.KINDS[work == "sample"]:
            if only in (None, kind):
                photos = setup.photos(args.side)
                sides[kind] = baseline.run(build(), work, kind, args.side, args.batch, *photos, args.compile)
    return sides


# ------------------------------------------------------------------------------------------------------- time


def synchronise(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def interleaved(
    sides: dict[str, Iterator[None]], rounds: int, turn: int, wait: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each step of each side, `rounds` turns of `turn` steps by turns, after one turn to warm
    up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, steps in sides.items():
            for _ in range(turn):
                start = time.perf_counter()
                next(steps)
                wait()
                if i:
                    times[name].append(time.perf_counter() - start)
    return times


def time_process_start(rounds: int, sides: list[str]) -> dict[str, list[float]]:
    """Seconds from the start of a process to the end of the first sampling step, with the embedded model."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for i in range(rounds + 1):  # the first round fills the page cache
        for name in sides:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", FIRST_STEP[name]], check=True, capture_output=True, env=env)
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def fastest_matmul(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product: the most that a step can reach on this device."""
    n = 8192 if device.startswith("cuda") else 1024
    a, best, wait = torch.randn(n, n, device=device, dtype=dtype), float("inf"), synchronise(device)
    for _ in range(10):
        wait()
        start = time.perf_counter()
        a @ a
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


# ----------------------------------------------------------------------------------------------------- memory


def limit_memory(args: Namespace) -> None:
    """Allow this process --cap GiB of the GPU's memory, to stand for a smaller card."""
    if args.cap and args.device.startswith("cuda"):
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap * 2**30 / total))


def send_peak(args: Namespace, work: str, side: str, pipe) -> None:
    """In a process of its own: do three steps of one side and send the peak memory in bytes."""
    limit_memory(args)
    with tempfile.TemporaryDirectory() as folder:
        steps = build_sides(args, work, Path(folder), side)[side]
        for _ in range(3):
            next(steps)
    if args.device.startswith("cuda"):
        pipe.send(torch.cuda.max_memory_allocated())
    else:  # getrusage would count what the parent used before this process was started from it
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        pipe.send(int(peak[1]) * 1024)


def peak_memory(args: Namespace, work: str, side: str) -> int | None:
    """Peak bytes of three steps in a new process; None if they do not fit (that process prints the error)."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe()
    process = spawn.Process(target=send_peak, args=(args, work, side, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()
