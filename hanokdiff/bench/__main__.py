"""Time and peak memory of training steps and of sampling, here and in diffusers and peft.

    python -m hanokdiff.bench                                  ours, on the tiny world
    python -m hanokdiff.bench --size small --vs diffusers      beside diffusers and peft, where installed
    python -m hanokdiff.bench --size sd15 --batch-size 8 --vs diffusers --cap 44 --memory          on a GPU
    python -m hanokdiff.bench start --vs diffusers             from the start of a process to the first step

Both sides have the same weights (random, but for the tiny world's), batch and precision. On a CPU they take
turns in one process, a few steps each; the ratio is of their fastest turns (of their medians in brackets): a
machine's other work slows some turns, never speeds one up. On a GPU each is built, measured and freed before
the next, so that none has to share --cap with another; what does not fit says so. A step of "sample" is a
whole batch of pictures; DreamBooth's are its own and the class's together. The faster baseline counts.

MFU is the share of the fastest matrix product here that the model's own operations take: the same operations
for every side. "limit" counts ours as executed, with what checkpointing and attention's backward pass repeat.
Read next: measure.py (how it is timed), baseline.py (diffusers' loops), budget.py (costs without a GPU).
"""

import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from hanokdiff.bench import budget, measure, setup
from hanokdiff.device import choose_device
from hanokdiff.errors import make_folder, report_errors
from hanokdiff.files import write_json
from hanokdiff.options import Options


def options() -> Options:
    p = Options(description=__doc__)
    works = ", ".join(setup.WORKS)
    p.add_argument("works", nargs="*", metavar="WORK", help=f"what to do: {works} (default: all but start)")
    p.add_argument("--size", default="tiny", choices=("tiny", *setup.SIZES), help="default: tiny")
    sides = "the baseline: its scripts' defaults, and its best flags"
    p.add_argument("--vs", choices=("diffusers",), help=sides)
    p.add_argument("--batch-size", type=int, help="pictures a step (default: the size's own)")
    p.add_argument("--rounds", type=int, default=7, help="turns of each side that count (default: 7)")
    p.add_argument("--turn", type=int, default=2, help="steps in a turn (default: 2)")
    p.add_argument("--device", help="default: the first GPU, else the CPU")
    p.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16 (default: auto)")
    p.add_argument("--cap", type=float, help="GiB of GPU memory to get by with: 44 stands for a 48 GB card")
    p.add_argument("--memory", action="store_true", help="on a CPU too: the peak of each side, in a process")
    p.add_argument("--share", action="store_true", help="also MFU, the share of the fastest matrix product")
    blocks = "ours block by block, the baseline at its best as a whole"
    p.add_argument("--compile", action="store_true", help=blocks)
    p.add_argument("--checkpointing", action="store_true", help="ours with checkpointing")
    p.add_argument("--channels-last", action="store_true", help="ours with convolutions in that layout")
    p.add_argument("--json", type=Path, help="write the figures here too")
    return p


def check(args: Namespace) -> None:
    """Refuse what cannot be measured before anything is built."""
    if unknown := [w for w in args.works if w not in setup.WORKS]:
        raise ValueError(f"{unknown[0]} is nothing to measure; choose of {', '.join(setup.WORKS)}")
    for name in ("batch_size", "rounds", "turn"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= 4096:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be from 1 to 4096")
    if args.cap is not None and not 0 < args.cap < float("inf"):
        raise ValueError(f"--cap is {args.cap:g}, but must be a number of GiB greater than 0")
    if "start" in args.works and (args.size, args.batch_size) != ("tiny", None):
        both = "start opens the embedded model and draws one picture"
        raise ValueError(f"{both}; leave out --size and --batch-size")
    if args.vs:
        measure.import_baseline()
    if args.json:
        make_folder(args.json.parent, "--json")


def rows(args: Namespace, work: str) -> Iterator[dict]:
    """One row of the table for each side, with the JSON's names."""
    ours = model = executed = None
    if args.share and work in (*setup.TRAINED, *setup.RECIPES, "sample"):
        model, executed = budget.share_of(work, args.size, args.batch, args.checkpointing)
    for name, measured in measure.time_sides(args, work):
        row = {"work": work, "side": name, **measured}
        if seconds := row.pop("seconds", None):
            low, median = min(seconds), statistics.median(seconds)
            quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [low] * 3
            row |= {"seconds_min": low, "seconds_median": median}
            row |= {"seconds_spread": quartiles[2] - quartiles[0]}
            row["steps"] = len(seconds) * (1 if work == "start" else args.turn)
            row["images_per_second"] = 0 if work == "start" else args.batch / low
            if name == "ours":
                ours = row
            if ours:
                row["ratio_min"] = low / ours["seconds_min"]
                row["ratio_median"] = median / ours["seconds_median"]
            if model:
                row["mfu"] = model / low / args.share
                row |= {"share_of_limit": executed / low / args.share} if name == "ours" else {}
        yield row


def header(args: Namespace) -> str:
    peak = "peak GiB" if args.memory or args.device.startswith("cuda") else ""
    mfu, limit = ("MFU", "limit") if args.share else ("", "")
    times = f"{'min ms':>10}{'median':>10}{'spread':>10}"
    columns = f"{'work':17}{'side':21}{times}{'images/s':>11} {peak:>9} {mfu:>5} {limit:>5}"
    return columns + "  theirs / ours: min (median)" * bool(args.vs)


def line(row: dict) -> str:
    if "seconds_min" not in row:
        return f"{row['work']:17}{row['side']:21} does not fit"
    times = "".join(f"{1e3 * row[f'seconds_{name}']:10.1f}" for name in ("min", "median", "spread"))
    rate = f"{row['images_per_second']:.2f}" if row["images_per_second"] else ""
    peak = f"{row['peak_bytes'] / 2**30:.2f}" if row.get("peak_bytes") else ""
    mfu, limit = (f"{row[name]:.0%}" if name in row else "" for name in ("mfu", "share_of_limit"))
    theirs = row["side"] != "ours" and "ratio_min" in row
    ratio = f"{row['ratio_min']:7.2f} ({row['ratio_median']:.2f})" if theirs else ""
    return f"{row['work']:17}{row['side']:21}{times}{rate:>11} {peak:>9} {mfu:>5} {limit:>5} {ratio}".rstrip()


@report_errors
def main(argv=None):
    args = options().parse_args(argv)
    check(args)
    device, args.dtype, why = choose_device(args.device, args.dtype, True, setup.parameters(args.size))
    if args.cap and device.type != "cuda":
        raise ValueError(f"--cap is for a GPU, but the device is {device}; leave it out")
    args.device, args.side = str(device), setup.side(args.size)
    args.batch = args.batch_size or setup.batch(args.size)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # measure.py speaks of the present one
    measure.limit_memory(args.cap)
    if args.share:
        args.share = measure.fastest_matmul(args.device, args.dtype)
        print(f"the fastest matrix product here: {args.share / 1e12:.2f}e12 operations a second")
    machine = measure.machine(args.device)
    task = f"{args.size}, {args.side} px, {args.batch} pictures a step"
    print(f"{task}; {machine['device']}, {why}; torch {torch.__version__}\n")
    print(header(args))
    told = ("size", "side", "batch", "cap", "compile", "checkpointing", "channels_last", "rounds", "turn")
    content = {**{name: getattr(args, name) for name in told}, "dtype": str(args.dtype), **machine}
    content |= {"matmul_operations_per_second": args.share or None, "rows": []}
    for work in args.works or (*setup.TRAINED, "sample"):
        for row in rows(args, work):
            print(line(row), flush=True)
            content["rows"].append(row)
            if args.json:
                write_json(args.json, content)


if __name__ == "__main__":
    sys.exit(main())
