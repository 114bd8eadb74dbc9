"""Time and peak memory of training steps and of sampling, in hanokdiff and in the baseline (diffusers)."""

import contextlib
import functools
import gc
import io
import multiprocessing
import os
import platform
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
from hanokdiff.formats.load import TINY_MODEL
from hanokdiff.models import memory
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.training.trainer import Trainer

FIRST_STEP = {  # side -> the code of a process that loads the embedded model and does one sampling step
    "ours": "from hanokdiff.formats.load import load_model; next(load_model().sample(['a house'], [0]))",
    "diffusers": f"from hanokdiff.bench import baseline; baseline.first_step({str(TINY_MODEL)!r})",
}


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


def sample(sd, side: int, batch: int, prompt="a house in the snow", attend: tuple = ()) -> Iterator[None]:
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


def sides(args: Namespace, work: str, folder: Path) -> dict[str, Callable[[], Iterator[None]]]:
    """Name of a side -> function that builds an iterator: a step of `work` each, files in `folder`."""

    def build():
        sd = setup.build(args.size, args.device, args.dtype)
        if args.channels_last:
            sd.unet.to(memory_format=torch.channels_last)
        return sd

    def ours():
        sd = build()
        if work.startswith("sample"):
            steps = sample(sd, args.side, args.batch, *setup.SAMPLED.get(work, ()))
        else:
            steps = train(sd, work, args.side, args.batch, folder)
        if args.compile:
            memory.compile(sd.unet)
        if args.checkpointing:
            memory.checkpoint(sd.unet)
        return steps

    def theirs(kind):
        how = (kind, args.side, args.batch, *setup.photos(args.side), args.compile)
        return import_baseline().run(build(), work, *how)

    out = {"ours": ours}
    if args.vs and work in (*setup.PEERS, "sample"):
        kinds = import_baseline().kinds(args.device)
        out |= {kind: functools.partial(theirs, kind) for kind in kinds}
    return out


def interleaved(sides: dict, rounds: int, turn: int, wait=lambda: None) -> dict[str, list[float]]:
    """Seconds of a step of each side, the mean of each of its `rounds` turns of `turn` steps, by turns, after
    one turn to warm up. `wait` for the device comes once a turn, as a run does not look at every step."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, steps in sides.items():
            start = time.perf_counter()
            for _ in range(turn):
                next(steps)
            wait()
            if i:
                times[name].append((time.perf_counter() - start) / turn)
    return times


def on_card(build: Callable[[], Iterator[None]], rounds: int, turn: int) -> dict:
    """Seconds of a step in each turn, peak bytes of these turns (of steps alone) and the clock in MHz, of one
    side that has the GPU to itself; nothing of them if it does not fit."""
    gc.collect()  # the side before, whose iterators and modules refer to each other
    torch.cuda.empty_cache()
    try:
        side = {"": build()}
        interleaved(side, 0, turn, torch.cuda.synchronize)  # what is allocated or compiled once
        torch.cuda.reset_peak_memory_stats()
        seconds = interleaved(side, rounds, turn, torch.cuda.synchronize)[""]
        peak = torch.cuda.max_memory_allocated()
        next(side[""])  # the clock of a busy card: this step runs on while nvidia-smi looks
        return {"seconds": seconds, "peak_bytes": peak, "clock_mhz": nvidia_smi("clocks.sm")}
    except torch.OutOfMemoryError:
        return {}


def time_sides(args: Namespace, work: str) -> Iterator[tuple[str, dict]]:
    """(name of a side, {"seconds": of a step in each turn, "peak_bytes": of its steps}). On a CPU the sides
    take turns, because other processes slow it now and then; on a GPU, where both may not fit, not."""
    if work == "start":
        names = ("ours", "diffusers") if args.vs else ("ours",)
        times = interleaved({name: start_process(name) for name in names}, args.rounds, 1)
        yield from ((name, {"seconds": seconds}) for name, seconds in times.items())
        return
    with tempfile.TemporaryDirectory() as folder:
        builders = sides(args, work, Path(folder))
        if args.device.startswith("cuda"):
            for name, build in builders.items():
                yield name, on_card(build, args.rounds, args.turn)
            return
        times = interleaved({name: build() for name, build in builders.items()}, args.rounds, args.turn)
    for name, seconds in times.items():
        peak = {"peak_bytes": peak_memory(args, work, name)} if args.memory else {}
        yield name, {"seconds": seconds} | peak


def start_process(side: str) -> Iterator[None]:
    """A new process at every next(), to the end of its first sampling step, with the embedded model."""
    command, env = [sys.executable, "-c", FIRST_STEP[side]], {**os.environ, "HF_HUB_OFFLINE": "1"}
    while True:
        subprocess.run(command, check=True, capture_output=True, env=env)
        yield


def fastest_matmul(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product: the most that a step can reach on this device."""
    gpu = device.startswith("cuda")
    n = 8192 if gpu else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)

    def products():
        while True:
            a @ a
            yield

    wait = torch.cuda.synchronize if gpu else lambda: None
    return 2 * n**3 / min(interleaved({"": products()}, 10, 10 if gpu else 1, wait)[""])


def limit_memory(gib: float | None) -> None:
    """Allow this process so much of the GPU's memory, to stand for a smaller card."""
    if gib:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def send_peak(args: Namespace, work: str, side: str, pipe) -> None:
    """In a process of its own, on a CPU: send the peak memory in bytes of three steps of one built side."""
    with tempfile.TemporaryDirectory() as folder:
        steps = sides(args, work, Path(folder))[side]()
        next(steps)  # what is allocated once
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        for _ in range(3):
            next(steps)
    # getrusage would count what the parent used before this process was started from it
    pipe.send(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)


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


def nvidia_smi(field: str) -> str | None:
    """What nvidia-smi says of the present GPU, such as its "driver_version"; None where it is missing."""
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    ask = ["nvidia-smi", gpu, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def machine(device: str) -> dict[str, str | None]:
    """What the figures belong to: the device's name, torch, CUDA and the driver."""
    out = {"torch": torch.__version__, "python": platform.python_version()}
    if device.startswith("cuda"):
        more = {name: nvidia_smi(name) for name in ("driver_version", "clocks.max.sm", "power.limit")}
        return {"device": torch.cuda.get_device_name(), **out, "cuda": torch.version.cuda, **more}
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    threads = f"{torch.get_num_threads()} threads on the CPU"
    return {"device": f"{threads} ({cpu[1]})" if cpu else threads, **out}
