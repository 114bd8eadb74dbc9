"""Time and peak memory of training steps and of sampling, here and in diffusers and peft.

    python -m hanokdiff.bench                                  ours, on the tiny world
    python -m hanokdiff.bench --size small --vs diffusers      beside diffusers and peft, where installed
    python -m hanokdiff.bench --size sd15 --batch-size 8 --vs diffusers --cap 44 --memory          on a GPU
    python -m hanokdiff.bench start --vs diffusers             from the start of a process to the first step

Both sides have the same weights (random, but for the tiny world's), batch and precision and take turns in one
process, a few steps each; the ratio is of their fastest steps (of their medians in brackets): a machine's
other work slows some turns, never speeds one up. With --memory each side runs once more, alone in a process
of its own. A step of "sample" is a whole batch of pictures; DreamBooth's pictures are its own and the class's
together.
Read next: measure.py (how it is timed), baseline.py (diffusers' loops), budget.py (costs without a GPU).
"""

import statistics
import sys
import tempfile
from argparse import Namespace
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
    p.add_argument(
        "--vs", choices=("diffusers",), help="the baseline: its scripts' defaults, and its best flags"
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
        "--compile", action="store_true", help="ours block by block, the baseline at its best as a whole"
    )
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
        raise ValueError(
            "start opens the embedded model and draws one picture; leave out --size and --batch-size"
        )
    if args.vs:
        measure.import_baseline()
    if args.json:
        make_folder(args.json.parent, "--json")


def time_work(args: Namespace, work: str) -> dict[str, list[float]]:
    """Name of a side -> seconds of each of its steps."""
    if work == "start":
        return measure.time_process_start(args.rounds, ["ours"] + ["diffusers"] * bool(args.vs))
    with tempfile.TemporaryDirectory() as folder:
        sides = measure.build_sides(args, work, Path(folder))
        return measure.interleaved(sides, args.rounds, args.turn, measure.synchronise(args.device))


def rows(args: Namespace, work: str) -> list[dict]:
    """One row of the table for each side, with the JSON's names."""
    times, out, operations = time_work(args, work), [], None
    if args.share and work in (*setup.TRAINED, *setup.RECIPES):
        operations = budget.step(work, args.size, args.batch, args.checkpointing)[0]
    for name, seconds in times.items():
        low, median = min(seconds), statistics.median(seconds)
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [low] * 3
        row = {
            "work": work,
            "side": name,
            "seconds_min": low,
            "seconds_median": median,
            "seconds_spread": quartiles[2] - quartiles[0],
            "steps": len(seconds),
            "images_per_second": 0 if work == "start" else args.batch / low,
            "ratio_min": low / min(times["ours"]),
            "ratio_median": median / statistics.median(times["ours"]),
        }
        if operations:
            row["share_of_limit"] = operations / low / args.share
        if args.memory and work != "start":
            row["peak_bytes"] = measure.peak_memory(args, work, name)
        out.append(row)
    return out


def header(args: Namespace) -> str:
    peak, share = "peak GiB" if args.memory else "", "limit" if args.share else ""
    times = f"{'min ms':>10}{'median':>10}{'spread':>10}"
    columns = f"{'work':17}{'side':18}{times}{'images/s':>11} {peak:>9} {share:>6}"
    return columns + "  theirs / ours: min (median)" * bool(args.vs)


def line(row: dict) -> str:
    times = "".join(f"{1e3 * row[f'seconds_{name}']:10.1f}" for name in ("min", "median", "spread"))
    rate = f"{row['images_per_second']:.2f}" if row["images_per_second"] else ""
    peak = f"{row['peak_bytes'] / 2**30:.2f}" if row.get("peak_bytes") else ""
    share = f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else ""
    ratio = "" if row["side"] == "ours" else f"{row['ratio_min']:7.2f} ({row['ratio_median']:.2f})"
    return f"{row['work']:17}{row['side']:18}{times}{rate:>11} {peak:>9} {share:>6} {ratio}".rstrip()


@report_errors
def main(argv=None):
    args = options().parse_args(argv)
    check(args)
    device, dtype, why = choose_device(args.device, args.dtype)
    if args.cap and device.type != "cuda":
        raise ValueError(f"--cap is for a GPU, but the device is {device}; leave it out")
    args.device, args.side = str(device), setup.side(args.size)
    args.batch = args.batch_size or setup.batch(args.size)
    measure.limit_memory(args)
    if args.share:
        args.share = measure.fastest_matmul(args.device, dtype)
        print(f"the fastest matrix product here: {args.share / 1e12:.2f}e12 operations a second")
    cpu = f"{torch.get_num_threads()} threads on the CPU"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    task = f"{args.size}, {args.side} px, {args.batch} pictures a step"
    print(f"{task}; {name}, {why}; torch {torch.__version__}\n")
    print(header(args))
    content = {
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
    for work in args.works or (*setup.TRAINED, "sample"):
        for row in rows(args, work):
            print(line(row), flush=True)
            content["rows"].append(row)
        if args.json:
            write_json(args.json, content)


if __name__ == "__main__":
    sys.exit(main())
