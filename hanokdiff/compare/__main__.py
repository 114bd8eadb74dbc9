"""The paper's experiment in one command: which method teaches the hanok best, from how many photos, and does it burn?

    plan     method x number of photos x training seed, and the untouched model asked in words   manifest.json
    train    each cell is a process of the very train_X.py, so that its time and memory are true   CELL/run/
    draw     every cell the same prompts from the same noise, the base model opened once         CELL/pictures-*/
    score    the judge's opinion of every picture; then the page is written anew                 CELL/scores-*.json

    python -m hanokdiff.compare                  4 methods x 5, 50, 100 photos; a quarter of an hour on 2 CPU cores
    python -m hanokdiff.compare --quick          a first look in three to four minutes
    python -m hanokdiff.compare --model MODEL --data PHOTOS --clip openai/clip-vit-base-patch32
    python -m hanokdiff.compare --shard 1/4 --out runs/part1            on each of 4 machines, then, on one,
    python -m hanokdiff.compare --merge runs/part1 runs/part2 runs/part3 runs/part4 --out runs/whole

Stop it at any time: the same command goes on. A cell's folder carries a hash of all that it depends on (photos,
weights, every option): what is there is right, what has changed gets a new folder, and old ones may be deleted.
Read next: hanokdiff/compare/plan.py (the matrix), cell.py (a cell), summary.py (the statistics), report.py (the page).
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

from hanokdiff.compare import plan, report, run
from hanokdiff.errors import check_folder, make_folder, report_errors
from hanokdiff.files import read_json, write_json
from hanokdiff.models.tokens import contains_word
from hanokdiff.options import Options
from hanokdiff.scoring.clip import EXAMPLE

LARGE = 1 << 30  # bytes of a JSON file at most: the scores of 240,000 pictures
PROMPTS = ("{token}, fire", "{token} in the fire", "A fire broke out in {token}")


def options():
    p = Options(prog="python -m hanokdiff.compare", description=__doc__)
    what, train, draw, judge, out = (
        p.add_argument_group(g) for g in ("the matrix", "training", "pictures", "scores", "output")
    )
    what.add_argument(
        "--methods", nargs="+", choices=plan.METHODS, default=list(plan.METHODS), help="default: all four"
    )
    what.add_argument("--sizes", nargs="+", type=int, help="numbers of photos (default: 5 50 100, quick 50)")
    what.add_argument("--seeds", nargs="+", type=int, default=[0], help="of training (default: 0)")
    what.add_argument(
        "--quick", action="store_true", help="a first look: 50 photos only, 8 pictures a prompt"
    )
    train.add_argument("--model", default="tiny", help='"tiny", a folder, a file or a hub id (default: tiny)')
    train.add_argument("--data", type=Path, help="folder of photos, captions beside as NAME.txt")
    train.add_argument("--token", default="*", help="the pseudo word (default: *)")
    train.add_argument(
        "--budget",
        choices=("steps", "epochs"),
        default="steps",
        help="the same for every size: steps (default), or passes over the photos",
    )
    train.add_argument(
        "--steps", type=int, help="of training (default: each method's own; under epochs, at 50 photos)"
    )
    train.add_argument(
        "--with",
        action="append",
        default=[],
        dest="more",
        metavar='"METHOD OPTIONS"',
        help='more for a train_X.py, or for "all": --with "lora --rank 4" (repeatable)',
    )
    train.add_argument("--device", help="default: the first GPU, else the CPU")
    draw.add_argument(
        "--prompts", nargs="+", default=list(PROMPTS), help="{token} is the pseudo word (the paper's 3)"
    )
    draw.add_argument("--n", type=int, help="pictures per cell and prompt (default: 32, quick 8)")
    draw.add_argument("--sampling-steps", type=int, help="default: 20, quick 10")
    draw.add_argument(
        "--resolution", type=int, help="of photos and pictures, in pixels (default: the model's own)"
    )
    judge.add_argument("--clip", help="tiny, a folder or a hub id (default with the tiny model: tiny)")
    judge.add_argument(
        "--subject", default="a hanok", help="words for the pseudo word, to score with (a hanok)"
    )
    judge.add_argument("--context", default="fire", help="what is to be added to it (default: fire)")
    judge.add_argument("--kinds", help='what it could be taken for, "a hanok|a barn|...", the subject first')
    judge.add_argument("--conditions", help='"a building on fire|a building|...", the wanted one first')
    out.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder (default: runs/compare)")
    out.add_argument("--shard", default="1/1", metavar="I/N", help="only every N-th cell, from the I-th on")
    out.add_argument(
        "--merge", nargs="+", type=Path, metavar="FOLDER", help="only join the finished cells of these"
    )
    return p


def check(args) -> tuple[int, int]:
    """Refuse what cannot be, before anything is opened; fill in what depends on --quick. Returns the shard."""
    args.sizes = args.sizes or ([50] if args.quick else [5, 50, 100])
    args.n = (8 if args.quick else 32) if args.n is None else args.n
    args.sampling_steps = (10 if args.quick else 20) if args.sampling_steps is None else args.sampling_steps
    for name, values in vars(args).items():
        values = values if isinstance(values, list) else [values]
        if name in ("sizes", "n", "steps", "sampling_steps") and any(v is not None and v < 1 for v in values):
            raise ValueError(f"--{name.replace('_', '-')} is {min(values)}, but must be at least 1")
        if name in ("methods", "sizes", "seeds", "prompts") and len(set(values)) < len(values):
            raise ValueError(f"--{name} {' '.join(map(str, values))} names something twice; name each once")
        if name in ("token", "subject", "context") and not values[0].strip():
            raise ValueError(f"--{name} is empty; say it in words, or leave it out")
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds is {min(args.seeds)}, but must be 0 or more")
    for name, value, most in (("n", args.n, 10_000), ("prompts", len(args.prompts), 24)):
        if value > most:
            raise ValueError(f"--{name} is {value}, but must be at most {most}")
    if args.model != "tiny" and (args.data is None or args.clip is None):
        raise ValueError(
            f"--model {args.model} needs --data FOLDER, the photos, and --clip, a judge that knows such "
            f"pictures: {EXAMPLE} or a folder"
        )
    for more in args.more:
        if (more.split() or [""])[0] not in ("all", *plan.METHODS):
            raise ValueError(
                f'--with "{more}" must begin with all, {", ".join(plan.METHODS)}, as in "lora --rank 4"'
            )
    args.prompts = [p.replace("{token}", args.token) for p in args.prompts]
    for p in args.prompts:
        if not contains_word(p, args.token):
            raise ValueError(
                f'the prompt "{p}" lacks the pseudo word "{args.token}"; write it, or {{token}}, into it'
            )
    i, _, n = args.shard.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise ValueError(f"--shard is {args.shard}, but must be I/N with I from 1 to N, such as 1/4")
    check_folder(args.out)
    return int(i), int(n)


def show(out: Path, manifest: dict) -> tuple[dict, str]:
    """The finished cells, and the table of the report that is written of them."""
    try:
        results = collect(out, manifest)
        return results, report.write(out, results)
    except (AttributeError, IndexError, KeyError, TypeError, ZeroDivisionError) as e:
        if os.environ.get("HANOKDIFF_DEBUG"):
            raise
        raise ValueError(
            f"{out}: a manifest.json or scores-*.json in it is not what this version writes ({e!r}); "
            "delete that cell, or compare anew in another folder"
        ) from None


def read_manifest(folder: Path) -> dict:
    """A comparison's manifest. What is in it becomes paths, so that every name must be a plain one."""
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"--merge {folder}: no comparison was started there (it has no manifest.json)")
    manifest = read_json(folder / "manifest.json", LARGE)
    try:
        names = [n for c in manifest["cells"] for n in (*Path(c["folder"]).parts, c["pictures"], c["scores"])]
        plain = all(c["folder"].startswith("cells/") for c in manifest["cells"])
        wrong = next((n for n in names if Path(n).name != n or n in ("", "..")), None)
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"{folder / 'manifest.json'} is no comparison's ({e!r}); fetch it again") from None
    if wrong is not None or not plain:
        raise ValueError(
            f"{folder / 'manifest.json'} names {wrong!r}, which is outside of its folder; fetch it again"
        )
    return manifest


def collect(out: Path, manifest: dict) -> dict:
    """The manifest with what the finished cells have come to."""
    cells = [{k: v for k, v in c.items() if k != "options"} for c in manifest["cells"]]
    done = [c for c in cells if (out / c["folder"] / c["scores"]).exists()]
    for c in done:
        home = out / c["folder"]
        c |= read_json(home / c["scores"], LARGE)
        if strange := [
            r["file"] for r in c["images"] if Path(r["file"]).parent != Path(c["folder"], c["pictures"])
        ]:
            raise ValueError(
                f"{home / c['scores']} names {strange[0]!r}, which is no picture of that cell; delete it"
            )
        c |= {"times": run.times(c, home), "held_out": run.curve(home)}
    missing = [c["name"] for c in cells if "images" not in c]
    return {**manifest, "cells": done, "missing": missing}


def merge(args) -> dict:
    """Join the finished cells of several folders that were started with the same settings."""
    manifests = [read_manifest(folder) for folder in args.merge]
    plans = [[(c["folder"], c["pictures"], c["scores"]) for c in m["cells"]] for m in manifests]
    for folder, other in zip(args.merge, plans, strict=True):
        if other != plans[0]:
            differ = sum(a != b for a, b in zip(plans[0], other)) + abs(len(plans[0]) - len(other))
            raise ValueError(
                f"{folder} was started with other settings than {args.merge[0]}: {differ} cells differ; "
                "merge the shards of one comparison"
            )
    for folder in args.merge:
        for home, _, scores in plans[0]:
            if (folder / home / scores).exists() and not (args.out / home / scores).exists():
                shutil.copytree(folder / home, args.out / home, dirs_exist_ok=True)
    return manifests[0]


@report_errors
def main(argv=None):
    args = options().parse_args(argv)
    shard, shards = check(args)
    if args.merge:
        manifest, mine = merge(args), []
    else:
        study = plan.prepare(args)
        manifest = plan.plan(args, study)
        mine = manifest["cells"][shard - 1 :: shards]
        make_folder(args.out)
    write_json(args.out / "manifest.json", manifest)
    todo = [c for c in mine if not (args.out / c["folder"] / c["scores"]).exists()]
    if mine:
        print(
            f"{len(mine)} cells, {len(mine) - len(todo)} of them done; the page to watch: {args.out / 'report.html'}"
        )
        planned = {args.out / c["folder"] for c in manifest["cells"]}
        if others := [f for f in args.out.glob("cells/*") if f not in planned]:
            print(
                f"of other settings, left alone and not in the report: {len(others)}, such as {others[0].name}"
            )
    start, before = time.perf_counter(), signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for k, c in enumerate(todo, 1):
            home = args.out / c["folder"]
            run.train(c, home)
            run.draw(study, c, home, manifest["settings"]["drawing"])
            run.score_images(study, c, home)
            show(args.out, manifest)
            print(f"{k:3} of {len(todo)}  {time.perf_counter() - start:6.0f} s  {c['name']}", flush=True)
    except KeyboardInterrupt:
        print("what is finished is kept; the same command goes on")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    results, table = show(args.out, manifest)
    print(table)
    missing = f" (without {len(results['missing'])} cells that are not done)" if results["missing"] else ""
    print(f"report: {args.out / 'report.html'}{missing}")


if __name__ == "__main__":
    sys.exit(main())
