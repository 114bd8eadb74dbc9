"""How fast, and in how much memory: a training step of each method and a picture, here and in the field's
usual tools.

    python -m hanokdiff.bench                                        ours, on the tiny world
    python -m hanokdiff.bench --size small --vs diffusers            beside diffusers and peft
    python -m hanokdiff.bench --size sd15 --batch-size 8 --vs diffusers --cap 44 --memory     on a GPU
    python -m hanokdiff.bench start --vs diffusers                   from start to first step

Both sides have the same weights (random, but for the tiny world's), batch and precision and take turns in one
process, a few steps each; the ratio is of their fastest steps (of their medians in brackets): a machine's
other work slows some turns, never speeds one up. With --memory each side runs once more, alone in a process
of its own. A step of "sample" is a whole batch of pictures; DreamBooth's pictures are its own and the class's
together.
Read next: hanokdiff/bench/baseline.py (the peers' loops), hanokdiff/bench/budget.py (the same step counted,
without a GPU).
"""

import contextlib
import io
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hanokdiff.bench import setup
from hanokdiff.device import choose_device
from hanokdiff.errors import make_folder, report_errors
from hanokdiff.files import write_json
from hanokdiff.formats.load import TINY_MODEL
from hanokdiff.models import memory
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.options import Options
from hanokdiff.training.trainer import Trainer

# ------------------------------------------------------------------------------------------------------- ours


def train(sd: StableDiffusion, method: str, side: int, batch: int, folder: Path) -> Iterator[None]:
    """Our training, a step at a time, chores and all."""
    trainable, losses = setup.prepare(sd, method, side)
    interrupt = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = Trainer(
            folder / method,
            trainable,
            steps=10**6,
            batch_size=batch,
            lr=1e-5,
            save=None,
            artefact="",
            config={},
        )
        steps = iter(run)
        part = next(steps)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), interrupt, strict=True):
        signal.signal(number, handler)  # nothing here is worth saving
    while True:
        run.update(losses(part))
        yield
        part = next(steps)


def sample(sd: StableDiffusion, side: int, batch: int) -> Iterator[None]:
    """Our sampler: STEPS steps of a picture for each of `batch` prompts, from the prompt to the latents."""
    while True:
        for _ in sd.sample(
            ["a house in the snow"] * batch,
            list(range(batch)),
            sampler="ddim",
            steps=setup.STEPS,
            cfg=7.5,
            size=(side, side),
        ):
            pass
        yield


def baseline_module():
    """hanokdiff/bench/baseline.py, which needs diffusers and peft; they are no packages of ours."""
    try:
        from hanokdiff.bench import baseline
    except ImportError as e:
        raise ValueError(
            f"--vs diffusers needs both sides: pip install -r requirements-dev.txt ({e})"
        ) from None
    return baseline


def contestants(args, work: str, folder: Path, only: str | None = None) -> dict[str, Iterator[None]]:
    """name -> what does one step of the work at every next(). What is written goes into `folder`."""
    dtype, out = choose_device(args.device, args.dtype)[1], {}

    def fresh():
        sd = setup.build(args.size, args.device, dtype)
        if args.channels_last:
            sd.unet.to(memory_format=torch.channels_last)
        return sd

    if only in (None, "ours"):
        sd = fresh()
        out["ours"] = (
            sample(sd, args.side, args.batch)
            if work == "sample"
            else train(sd, work, args.side, args.batch, folder)
        )
        if args.compile:
            memory.compile(sd.unet)
        if args.checkpointing:
            memory.checkpoint(sd.unet)
    if args.vs and not work.startswith("hypernet"):  # which it has not
        peers = baseline_module()
        for kind in peers.KINDS[work == "sample"]:
            if only in (None, kind):
                out[kind] = peers.run(
                    fresh(), work, kind, args.side, args.batch, *setup.photos(args.side), args.compile
                )
    return out


# -------------------------------------------------------------------------------------------------- measuring


def interleaved(
    sides: dict[str, Iterator[None]], rounds: int, turn: int, wait: Callable
) -> dict[str, list[float]]:
    """Seconds of a step on each side; they take turns of `turn` steps. The first turn warms up."""
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


def waiter(device: str) -> Callable:
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def alone(args, work: str, side: str, pipe) -> None:
    """In a process of its own: three steps, and the most memory they took."""
    limit(args)
    with tempfile.TemporaryDirectory() as folder:
        steps = contestants(args, work, Path(folder), side)[side]
        for _ in range(3):
            next(steps)
    if args.device.startswith("cuda"):
        pipe.send(torch.cuda.max_memory_allocated())
    else:  # getrusage would count what the parent had before this process became its own
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        pipe.send(int(peak[1]) * 1024)


def peak_memory(args, work: str, side: str) -> int | None:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=alone, args=(args, work, side, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:  # it did not fit, and has said so
        return None
    finally:
        process.join()


def limit(args) -> None:
    """Stand for a card of --cap GiB on a larger one."""
    if args.cap and args.device.startswith("cuda"):
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap * 2**30 / torch.cuda.mem_get_info()[1]))


def fastest_product(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the limit that can be reached here."""
    n = 8192 if device.startswith("cuda") else 1024
    a, best, wait = torch.randn(n, n, device=device, dtype=dtype), float("inf"), waiter(device)
    for _ in range(10):
        wait()
        start = time.perf_counter()
        a @ a
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def start(args) -> dict[str, list[float]]:
    """Seconds from the start of a process to the end of the first sampling step, with the embedded model."""
    ours = "from hanokdiff import model; next(model.load(say=None).sample(['a house'], [0]))"
    theirs = f"from hanokdiff import peers; peers.first_step({str(TINY_MODEL)!r})"
    times: dict[str, list[float]] = {}
    for i in range(args.rounds + 1):  # the first fills the page cache
        for name, code in [("ours", ours)] + [("diffusers", theirs)] * bool(args.vs):
            begin = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", code],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            if i:
                times.setdefault(name, []).append(time.perf_counter() - begin)
    return times


# ------------------------------------------------------------------------------------------------ the command


def rows(args, work: str) -> list[dict]:
    """One row for each side."""
    with tempfile.TemporaryDirectory() as folder:
        times = (
            start(args)
            if work == "start"
            else interleaved(
                contestants(args, work, Path(folder)), args.rounds, args.turn, waiter(args.device)
            )
        )
    pictures, operations, out = 0 if work == "start" else args.batch, None, []
    if args.share and work in setup.TRAINED:
        from hanokdiff.bench import budget

        operations = budget.step(work, args.size, args.batch, args.checkpointing)[0]
    for name, seconds in times.items():
        low, middle = min(seconds), statistics.median(seconds)
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [low] * 3
        row = {
            "work": work,
            "side": name,
            "seconds_min": low,
            "seconds_median": middle,
            "seconds_spread": quartiles[2] - quartiles[0],
            "steps": len(seconds),
            "images_per_second": pictures / low,
            "ratio_min": low / min(times["ours"]),
            "ratio_median": middle / statistics.median(times["ours"]),
        }
        if operations:
            row["share_of_limit"] = operations / low / args.share
        if args.memory and work != "start":
            row["peak_bytes"] = peak_memory(args, work, name)
        out.append(row)
    return out


def line(row: dict) -> str:
    peak = f"{row['peak_bytes'] / 2**30:9.2f}" if row.get("peak_bytes") else " " * 9
    rate = f"{row['images_per_second']:11.2f}" if row["images_per_second"] else " " * 11
    share = f"{row['share_of_limit']:6.0%}" if "share_of_limit" in row else " " * 6
    ratio = "" if row["side"] == "ours" else f"{row['ratio_min']:7.2f} ({row['ratio_median']:.2f})"
    return (
        f"{row['work']:13}{row['side']:18}{1e3 * row['seconds_min']:10.1f}{1e3 * row['seconds_median']:10.1f}"
        f"{1e3 * row['seconds_spread']:10.1f}{rate} {peak} {share} {ratio}"
    ).rstrip()


@report_errors
def main(argv=None):
    p = Options(description=__doc__)
    p.add_argument(
        "works",
        nargs="*",
        metavar="WORK",
        help=f"what to do: {', '.join(setup.WORKS)} (default: all but start)",
    )
    p.add_argument("--size", default="tiny", choices=("tiny", *setup.SIZES), help="default: tiny")
    p.add_argument(
        "--vs", choices=("diffusers",), help="the other side: its scripts' defaults, and its best flags"
    )
    p.add_argument("--batch-size", type=int, help="pictures a step (default: the size's own)")
    p.add_argument("--rounds", type=int, default=7, help="turns of each side that count (default: 7)")
    p.add_argument("--turn", type=int, default=2, help="steps in a turn (default: 2)")
    p.add_argument("--device", help="default: the first GPU, else the CPU")
    p.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16 (default: auto)")
    p.add_argument("--cap", type=float, help="GiB of GPU memory to get by with: 44 stands for a 48 GB card")
    p.add_argument("--memory", action="store_true", help="also the peak of each side, alone in a process")
    p.add_argument("--share", action="store_true", help="also the share of the fastest matrix product")
    p.add_argument(
        "--compile", action="store_true", help="ours block by block, and the peer at its best as a whole"
    )
    p.add_argument("--checkpointing", action="store_true", help="ours with checkpointing")
    p.add_argument("--channels-last", action="store_true", help="ours with convolutions in that layout")
    p.add_argument("--json", type=Path, help="write the figures here too")
    args = p.parse_args(argv)
    if strange := [w for w in args.works if w not in setup.WORKS]:
        raise ValueError(f"{strange[0]} is nothing to measure; choose of {', '.join(setup.WORKS)}")
    for name in ("batch_size", "rounds", "turn"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) <= 4096:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be from 1 to 4096"
            )
    if args.cap is not None and not 0 < args.cap < float("inf"):
        raise ValueError(f"--cap is {args.cap:g}, but must be a number of GiB greater than 0")
    if "start" in args.works and (args.size, args.batch_size) != ("tiny", None):
        raise ValueError(
            "start opens the embedded model and draws one picture; leave out --size and --batch-size"
        )
    if args.vs:
        baseline_module()
    if args.json:
        make_folder(args.json.parent, "--json")
    device, dtype, why = choose_device(args.device, args.dtype)
    if args.cap and device.type != "cuda":
        raise ValueError(f"--cap is for a GPU, but the device is {device}; leave it out")
    args.device, args.side = str(device), setup.side(args.size)
    args.batch = args.batch_size or (8 if args.size == "tiny" else setup.SIZES[args.size].batch)
    limit(args)
    if args.share:
        args.share = fastest_product(args.device, dtype)
        print(f"the fastest matrix product here: {args.share / 1e12:.2f}e12 operations a second")
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads on the CPU"
    )
    print(
        f"{args.size}, {args.side} px, {args.batch} pictures a step; {name}, {why}; torch "
        f"{torch.__version__}\n"
    )
    peak, share = "peak GiB" if args.memory else "", "limit" if args.share else ""
    print(
        f"{'work':13}{'side':18}{'min ms':>10}{'median':>10}{'spread':>10}{'images/s':>11} {peak:>9} "
        f"{share:>6}" + "  theirs / ours: min (median)" * bool(args.vs)
    )
    about = {
        "size": args.size,
        "side": args.side,
        "batch": args.batch,
        "device": name,
        "dtype": str(dtype),
        "torch": torch.__version__,
        "cap": args.cap,
        "compile": args.compile,
        "checkpointing": args.checkpointing,
        "rows": [],
    }
    for work in args.works or setup.WORKS[:-1]:
        for row in rows(args, work):
            print(line(row), flush=True)
            about["rows"].append(row)
        if args.json:
            write_json(args.json, about)


if __name__ == "__main__":
    sys.exit(main())
