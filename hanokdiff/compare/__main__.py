"""The paper's experiment in one command: which recipe, how many photos, does it burn?

    plan     recipe x number of photos x set of photos, and the untouched model     manifest.json
    train    each a process of train_X.py of its own, as many at once as cores      CELL/run/
    draw     every cell the same prompts from the same noise                        CELL/pictures-*/
    score    every picture by CLIP; then the page is written anew                   CELL/scores-*.json

    python -m hanokdiff.compare            each method's best, 5, 50, 100 photos; 8 to 11 minutes, 2 cores
    python -m hanokdiff.compare --quick    a first look in three minutes
    python -m hanokdiff.compare --preset factorial --sizes 50 --seeds 1 2 3 4 5 6 7 8 --n 32    of the study
    python -m hanokdiff.compare --recipe LoRA --recipe "small=lora --rank 4"  your own question
    python -m hanokdiff.compare --model MODEL --data PHOTOS --clip openai/clip-vit-base-patch32
    python -m hanokdiff.compare --shard 1/4 --out runs/part1            on each of 4 machines, then, on one,
    python -m hanokdiff.compare --merge runs/part1 runs/part2 runs/part3 runs/part4 --out runs/whole

Stop it at any time: the same command goes on. A cell's folder carries a hash of all that it depends on
(photos, weights, every option): what has changed gets a new folder, and old ones may be deleted.
Read next: hanokdiff/compare/recipes.py (what is compared), plan.py (the matrix), run.py (a cell),
summary.py (the statistics), sections.py (the report).
"""

import argparse
import math
import signal
import sys
import time
from pathlib import Path

import torch

from hanokdiff import lock
from hanokdiff.compare import plan, recipes, results, workers
from hanokdiff.errors import check_folder, make_folder, report_errors
from hanokdiff.files import write_json
from hanokdiff.models.tokens import contains_word
from hanokdiff.options import Options
from hanokdiff.scoring.clip import EXAMPLE

PROMPTS = ("{token}, fire", "{token} in the fire", "A fire broke out in {token}")


def options():
    p = Options(prog="python -m hanokdiff.compare", description=__doc__)
    add = p.add_argument_group("the matrix").add_argument
    known = "; ".join(f"{name}: {', '.join(names)}" for name, (names, _) in recipes.PRESETS.items())
    known = f"groups of recipes (default: best). {known}"
    add("--preset", nargs="+", choices=recipes.PRESETS, metavar="NAME", help=known)
    own = 'one of those by its name, or your own: --recipe "small=lora --rank 4" (repeatable)'
    add("--recipe", action="append", default=[], metavar='"NAME=METHOD OPTIONS"', help=own)
    add("--sizes", nargs="+", type=int, help="numbers of photos (default: 5 50 100, quick 50)")
    add("--seeds", nargs="+", type=int, default=[1], help="each its own photos, start and noise (default: 1)")
    add("--same-photos", action="store_true", help="the same photos for all seeds")
    strengths = "at which LoRAs and hypernetworks are drawn, of one training (default: 1)"
    add("--strengths", nargs="+", type=float, default=[1.0], help=strengths)
    at = "shares of a training's steps to draw at (default: 1)"
    add("--at", nargs="+", type=float, default=[1.0], help=at)
    add("--quick", action="store_true", help="a first look: 50 photos, 3/4 of the steps, 8 pictures a prompt")
    add = p.add_argument_group("training").add_argument
    add("--model", default="tiny", help='"tiny", a folder, a file or a hub id (default: tiny)')
    add("--data", type=Path, help="folder of photos, captions beside as NAME.txt")
    add("--token", default="*", help="the pseudo word (default: *)")
    budget = "the same for every size: steps (default), or passes over the photos"
    add("--budget", choices=("steps", "epochs"), default="steps", help=budget)
    add("--steps", type=int, help="of training (default: a recipe's own; under epochs, at 50 photos)")
    add("--jobs", type=int, help="trainings at once (default: one per GPU, else one per core)")
    add("--device", help="default: the first GPU, else the CPU")
    add = p.add_argument_group("pictures").add_argument
    add("--prompts", nargs="+", default=list(PROMPTS), help="{token} is the pseudo word (the paper's 3)")
    add("--n", type=int, help="pictures per cell and prompt (default: 16, quick 8)")
    add("--sampling-steps", type=int, help="default: 20, quick 10")
    add("--resolution", type=int, help="of photos and pictures, in pixels (default: the model's own)")
    add = p.add_argument_group("scores").add_argument
    add("--clip", help="tiny, a folder or a hub id (default with the tiny model: tiny)")
    add("--subject", default="a hanok", help="words for the pseudo word, to score with (a hanok)")
    add("--context", default="fire", help="what is to be added to it (default: fire)")
    add("--kinds", help='what it could be taken for, "a hanok|a barn|...", the subject first')
    add("--conditions", help='"a building on fire|a building|...", the wanted one first')
    add = p.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path("runs/compare"), help="folder (default: runs/compare)")
    add("--lang", choices=("en", "ko"), default="en", help="of the report; sheets keep English labels")
    add("--shard", default="1/1", metavar="I/N", help="only every N-th training, from the I-th on")
    add("--merge", nargs="+", type=Path, metavar="FOLDER", help="only join the finished cells of these")
    return p


def check(args) -> tuple[int, int]:
    """Refuse what cannot be, before anything is opened; fill in what depends on --quick. Returns the
    shard."""
    args.sizes = args.sizes or ([50] if args.quick else [5, 50, 100])
    args.n = (8 if args.quick else 16) if args.n is None else args.n
    args.sampling_steps = (10 if args.quick else 20) if args.sampling_steps is None else args.sampling_steps
    for name, values in vars(args).items():
        values = values if isinstance(values, list) else [values]
        counts = ("sizes", "n", "steps", "sampling_steps", "jobs")
        if name in counts and any(v is not None and v < 1 for v in values):
            raise ValueError(f"--{name.replace('_', '-')} is {min(values)}, but must be at least 1")
        if name in ("preset", "sizes", "seeds", "prompts", "at", "strengths") and len(set(values)) < len(
            values
        ):
            raise ValueError(f"--{name} {' '.join(map(str, values))} names something twice; name each once")
        if name in ("token", "subject", "context") and not values[0].strip():
            raise ValueError(f"--{name} is empty; say it in words, or leave it out")
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds is {min(args.seeds)}, but must be 0 or more")
    if not all(0 < at <= 1 for at in args.at) or 1 not in args.at:
        raise ValueError(
            f"--at {' '.join(f'{at:g}' for at in args.at)}: shares of the steps, above 0 and up to 1, and 1 "
            "itself among them, such as 0.5 1"
        )
    if not all(math.isfinite(s) for s in args.strengths) or 1 not in args.strengths:
        raise ValueError(
            f"--strengths {' '.join(f'{s:g}' for s in args.strengths)}: numbers, and 1 among them, such as "
            "0.5 1"
        )
    for name, value, most in (("n", args.n, 10_000), ("prompts", len(args.prompts), 24)):
        if value > most:
            raise ValueError(f"--{name} is {value}, but must be at most {most}")
    if args.model != "tiny" and (args.data is None or args.clip is None):
        raise ValueError(
            f"--model {args.model} needs --data FOLDER, the photos, and --clip, a model that "
            f"knows such pictures: {EXAMPLE} or a folder"
        )
    own = recipes.parse(args.recipe, plan.METHODS)
    presets = args.preset or ([] if own else ["best"])
    args.recipes, args.trained_at = recipes.chosen(presets, own, sorted(args.sizes))
    alone = argparse.Namespace(**vars(args) | {"model": "tiny", "data": None})
    for name, words in args.recipes.items():  # refuses wrong options; --model and --data are looked at later
        plan.training(alone, words, max(args.trained_at[name]), held_out=0, seed=args.seeds[0])
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


def run_cells(args, context: plan.Context, manifest: dict, argv: list[str], shard: int, shards: int) -> None:
    """Train, draw and score what is missing; the report is written anew after each training."""
    out, groups, drawing = args.out, workers.trainings(manifest["cells"]), manifest["settings"]["drawing"]
    mine = range(shard - 1, len(groups), shards)
    todo = [i for i in mine if not all((out / c["folder"] / c["scores"]).exists() for c in groups[i])]
    todo = workers.longest_first(groups, todo)
    jobs = args.jobs or workers.usual_jobs(context.sd, args.device)
    cells = sum(len(groups[i]) for i in mine)
    left = sum(len(groups[i]) for i in todo)
    side = f", {min(jobs, len(todo))} trainings at once" if min(jobs, len(todo)) > 1 else ""
    print(
        f"{cells} cells, {cells - left} of them done{side}; the page to watch: {out / 'report.html'}",
        flush=True,
    )
    planned = {out / c["folder"] for c in manifest["cells"]}
    if others := [f for f in out.glob("cells/*") if f not in planned]:
        print(f"of other settings, left alone and not in the report: {len(others)}, such as {others[0].name}")
    if jobs > 1 and todo:  # also for the last one alone: with all cores it would sum in another order
        context.sd = context.clip = None  # every worker opens its own
        torch.cuda.empty_cache()
        finished = workers.side_by_side(argv, todo, jobs)
    else:
        finished = in_turn(context, out, drawing, groups, todo)
    start = time.perf_counter()
    for k, i in enumerate(finished, 1):
        results.write_report(out, manifest)
        seconds = time.perf_counter() - start
        rest = seconds / k * (len(todo) - k)
        name = groups[i][0]["name"]
        print(f"{k:3} of {len(todo)}  {seconds:6.0f} s, about {rest / 60:.0f} min left  {name}", flush=True)


def in_turn(context: plan.Context, out: Path, drawing: dict, groups: list, todo: list[int]):
    for i in todo:
        workers.do(context, out, drawing, groups[i])
        yield i


@report_errors
def main(argv=None):
    args = options().parse_args(argv)
    shard, shards = check(args)
    if args.merge:
        manifest = results.merge(args.merge, args.out)
    else:
        context = plan.prepare(args)
        manifest = plan.plan(args, context)
        make_folder(args.out)
        lock.take(args.out)
    manifest["settings"]["language"] = args.lang
    write_json(args.out / "manifest.json", manifest)
    if not args.merge:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            run_cells(args, context, manifest, sys.argv[1:] if argv is None else argv, shard, shards)
        except KeyboardInterrupt:
            print("what is finished is kept; the same command goes on")
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    found, table = results.write_report(args.out, manifest)
    print(table)
    missing = f" (without {len(found['missing'])} cells that are not done)" if found["missing"] else ""
    print(f"report: {args.out / 'report.html'}{missing}")


if __name__ == "__main__":
    sys.exit(main())
