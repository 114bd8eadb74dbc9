"""The paper's experiment in one command: which method, how many photos, does it burn?

    plan     method x number of photos x training seed, and the untouched model     manifest.json
    train    each cell is a process of train_X.py, so that time and memory are true     CELL/run/
    draw     every cell the same prompts from the same noise, the model opened once     CELL/pictures-*/
    score    every picture by CLIP; then the page is written anew                       CELL/scores-*.json

    python -m hanokdiff.compare            4 methods x 5, 50, 100 photos; 15 minutes on 2 CPU cores
    python -m hanokdiff.compare --quick    a first look in three to four minutes
    python -m hanokdiff.compare --model MODEL --data PHOTOS --clip openai/clip-vit-base-patch32
    python -m hanokdiff.compare --shard 1/4 --out runs/part1            on each of 4 machines, then, on one,
    python -m hanokdiff.compare --merge runs/part1 runs/part2 runs/part3 runs/part4 --out runs/whole

Stop it at any time: the same command goes on. A cell's folder carries a hash of all that it depends on
(photos, weights, every option): what has changed gets a new folder, and old ones may be deleted.
Read next: hanokdiff/compare/plan.py (the matrix), run.py (a cell), summary.py (the
statistics), sections.py (the report).
"""

import signal
import sys
import time
from pathlib import Path

from hanokdiff.compare import plan, results, run
from hanokdiff.errors import check_folder, make_folder, report_errors
from hanokdiff.files import write_json
from hanokdiff.models.tokens import contains_word
from hanokdiff.options import Options
from hanokdiff.scoring.clip import EXAMPLE

PROMPTS = ("{token}, fire", "{token} in the fire", "A fire broke out in {token}")


def options():
    p = Options(prog="python -m hanokdiff.compare", description=__doc__)
    add = p.add_argument_group("the matrix").add_argument
    add("--methods", nargs="+", choices=plan.METHODS, default=list(plan.METHODS), help="default: all four")
    add("--sizes", nargs="+", type=int, help="numbers of photos (default: 5 50 100, quick 50)")
    add("--seeds", nargs="+", type=int, default=[0], help="of training (default: 0)")
    add("--quick", action="store_true", help="a first look: 50 photos only, 8 pictures a prompt")
    add = p.add_argument_group("training").add_argument
    add("--model", default="tiny", help='"tiny", a folder, a file or a hub id (default: tiny)')
    add("--data", type=Path, help="folder of photos, captions beside as NAME.txt")
    add("--token", default="*", help="the pseudo word (default: *)")
    budget = "the same for every size: steps (default), or passes over the photos"
    add("--budget", choices=("steps", "epochs"), default="steps", help=budget)
    add("--steps", type=int, help="of training (default: each method's own; under epochs, at 50 photos)")
    more = 'more for a train_X.py, or for "all": --with "lora --rank 4" (repeatable)'
    add("--with", action="append", default=[], dest="more", metavar='"METHOD OPTIONS"', help=more)
    add("--device", help="default: the first GPU, else the CPU")
    add = p.add_argument_group("pictures").add_argument
    add("--prompts", nargs="+", default=list(PROMPTS), help="{token} is the pseudo word (the paper's 3)")
    add("--n", type=int, help="pictures per cell and prompt (default: 32, quick 8)")
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
    add("--shard", default="1/1", metavar="I/N", help="only every N-th cell, from the I-th on")
    add("--merge", nargs="+", type=Path, metavar="FOLDER", help="only join the finished cells of these")
    return p


def check(args) -> tuple[int, int]:
    """Refuse what cannot be, before anything is opened; fill in what depends on --quick. Returns the
    shard."""
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
            f"--model {args.model} needs --data FOLDER, the photos, and --clip, a model that "
            f"knows such pictures: {EXAMPLE} or a folder"
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


def run_cells(context: plan.Context, out: Path, manifest: dict, cells: list[dict]) -> None:
    """Train, draw and score what is missing of these cells; the report is written anew after each."""
    todo = [c for c in cells if not (out / c["folder"] / c["scores"]).exists()]
    print(
        f"{len(cells)} cells, {len(cells) - len(todo)} of them done; the page to watch: {out / 'report.html'}"
    )
    planned = {out / c["folder"] for c in manifest["cells"]}
    if others := [f for f in out.glob("cells/*") if f not in planned]:
        print(f"of other settings, left alone and not in the report: {len(others)}, such as {others[0].name}")
    start = time.perf_counter()
    for k, c in enumerate(todo, 1):
        folder = out / c["folder"]
        run.train(c, folder)
        run.draw(context, c, folder, manifest["settings"]["drawing"])
        run.score_images(context, c, folder)
        results.write_report(out, manifest)
        print(f"{k:3} of {len(todo)}  {time.perf_counter() - start:6.0f} s  {c['name']}", flush=True)


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
    write_json(args.out / "manifest.json", manifest)
    if not args.merge and (cells := manifest["cells"][shard - 1 :: shards]):
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            run_cells(context, args.out, manifest, cells)
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
