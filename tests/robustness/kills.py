"""Kill (SIGKILL) the four trainers and the comparison at random moments, let them go on, and compare what
they leave.

    python tests/robustness/kills.py --kills 100     all five, a quarter of an hour, prints a table
    python tests/robustness/kills.py --kills 5 --only LoRA "textual inversion"

A run is killed up to six times, then finishes and must equal one that was left in peace: the artefact and the
numbered files in every tensor, the previews to the byte, the log times aside, and not a file more or less.
After every kill the log must be whole. Children are forked from a process that has imported everything: a
start costs tenths of a second. Half of the kills are aimed at the moments that could hurt: while something is
written, or has just been. The comparison has two trainings at once, in processes of their own, which end with
it. On a busy machine OMP_WAIT_POLICY=passive saves the time that waiting threads would take.
"""

import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # as a script it sees its own folder only

from hanokdiff.compare import plan  # noqa: E402
from hanokdiff.formats import embedding_file, folder, hypernet_file, load, lora_file  # noqa: E402
from hanokdiff.formats.tensors import read_safetensors  # noqa: E402
from hanokdiff.training import prior  # noqa: E402
from hanokdiff.training.trainer import Trainer  # noqa: E402

COMMON = "--images 5 --held-out 2 --batch-size 2 --steps 24 --save-every 5 --preview-every 10 --device cpu"
COMMON = COMMON.split()
RUNS = {  # name -> module and options
    "textual inversion": ("train_ti", COMMON),
    "DreamBooth": ("train_dreambooth", [*COMMON, "--class-images", "5"]),
    "LoRA": ("train_lora", [*COMMON, "--text-rank", "2", "--class-images", "5"]),
    "hypernetwork": ("train_hypernet", [*COMMON, "--dropout", "0.3"]),
    "comparison": ("hanokdiff.compare.__main__", [
        "--recipe", "LoRA=lora --save-every 4 --batch-size 2 --class-images 3",
        "--recipe", "TI=ti --save-every 4 --batch-size 2", "--sizes", "5", "--steps", "12", "--n", "1",
        "--sampling-steps", "3", "--prompts", "{token}, fire", "--device", "cpu", "--jobs", "2"]),
}  # fmt: skip
PLACES = [  # what is under way while these run
    (load, "load_model", "opening"), (plan, "prepare", "opening"), (prior, "pictures", "class pictures"),
    (Trainer, "_load_state", "resuming"), (Trainer, "_validate", "held-out loss"),
    (Trainer, "_preview", "preview"), (Trainer, "save_state", "state"), (Trainer, "_finish", "finishing"),
    (lora_file, "save_file", "file"), (embedding_file, "save_file", "file"),
    (hypernet_file, "save_file", "file"), (folder, "save_folder", "file"),
]  # fmt: skip
SIGNS = {  # a comparison works in processes of its own, and is seen by what they write
    "report": "report.html", "scoring": "scores-*.json", "drawing": "pictures-*", "training": "state/*",
}  # fmt: skip
AIMS = {  # and how many seconds after it has begun at most
    "trainer": {"state": 0.01, "file": 0.01, "final file": 0.01, "preview": 0.3},
    "DreamBooth": {"state": 0.2, "file": 0.2, "final file": 0.2, "preview": 0.3, "class pictures": 0.8},
    "comparison": {"training": 3, "drawing": 0.3, "scoring": 0.2, "report": 0.05},
}


# -------------------------------------------------------------------------------------------------- the child


def child(module: str, argv: list[str], home: Path) -> None:
    """One start of a script in its home. What it is doing stands in a file, which outlives it."""
    os.chdir(home)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))  # 1 under pytest -n 2
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    doing, now = os.open("doing", os.O_RDWR | os.O_CREAT), ["starting", 0]

    def tell(what, step):
        now[:] = what, step
        os.pwrite(doing, f"{what}\t{step}".ljust(40).encode(), 0)

    def told(f, what):
        @functools.wraps(f)
        def wrapped(*args, **kwargs):
            before = now[0]
            step = getattr(args[0], "step", now[1]) if args else now[1]
            tell(what if before != "finishing" else "final file", step)
            try:
                return f(*args, **kwargs)
            finally:
                tell(before, now[1])

        return wrapped

    def update(run, losses, original=Trainer.backward):
        tell("step", run.step)
        original(run, losses)

    tell("starting", 0)
    for place, name, what in PLACES:
        setattr(place, name, told(getattr(place, name), what))
    Trainer.backward = update
    sys.exit(importlib.import_module(module).main(argv))


def doing(home: Path) -> tuple[str, int]:
    what, _, step = (home / "doing").read_text().strip().partition("\t")
    return what, int(step or 0)


def writing(home: Path, since: float) -> tuple[str, int]:
    """What a comparison that was started then has last written."""
    times = {"opening": since}
    for what, sign in SIGNS.items():
        for file in (home / "out").rglob(sign):
            with contextlib.suppress(FileNotFoundError):  # renamed while we look
                times[what] = max(times.get(what, 0), file.stat().st_mtime)
    return max(times, key=times.get), 0


# ------------------------------------------------------------------------------------------- what is compared


def plain(x):
    """Anything that torch or json reads, comparable with ==."""
    if isinstance(x, torch.Tensor):
        content = x.contiguous().view(torch.uint8).numpy().tobytes() if x.dim() else x.item()
        return str(x.dtype), tuple(x.shape), content
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, list | tuple) else x


def log(file: Path) -> list[dict]:
    """The lines, times aside; a ValueError if one is not whole."""
    return [{k: v for k, v in json.loads(r).items() if k != "seconds"} for r in file.read_text().splitlines()]


def content(file: Path):
    if file.suffix == ".safetensors":
        return plain(read_safetensors(file, "model"))
    if file.suffix == ".pt":
        return plain(torch.load(file, weights_only=True))
    if file.name == "log.jsonl":
        return log(file)
    if file.name == "results.json":
        found = json.loads(file.read_text())
        return {**found, "cells": [{k: v for k, v in c.items() if k != "times"} for c in found["cells"]]}
    return file.read_bytes()


TIMED = ("index.html", "log.csv", "class.json")  # the log once more, times and all; seconds of drawing


def left(home: Path, comparison: bool) -> dict:
    """All that a finished run leaves, by name. Of a comparison, its figures: the report tells times."""
    out = home / "out"
    files = [out / "results.json", out / "images.csv"]
    if not comparison:
        files = [f for f in out.rglob("*") if f.is_file() and f.name not in TIMED]
    return {str(f.relative_to(out)): content(f) for f in files}


# ------------------------------------------------------------------------------------------------- the killer


@dataclass
class Tally:
    kills: int = 0
    runs: int = 0
    moments: Counter = field(default_factory=Counter)
    steps: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


def server():
    """Forks children from a process that has imported everything, and has computed nothing."""
    fork = multiprocessing.get_context("forkserver")
    modules = [m for m, _ in RUNS.values()]
    fork.set_forkserver_preload([*modules, "transformers.models.clip.tokenization_clip"])
    return fork


def killed(name: str, kills: int, folder: Path, seed: int = 0, options=(), each: int = 6) -> Tally:
    """Kill so many times, each run up to `each` times, and compare all runs with one in peace."""
    module, argv = RUNS[name]
    argv, comparison = [*argv, *options], name == "comparison"
    dice, tally, fork = random.Random(f"{name} {seed}"), Tally(), server()

    def start(home: Path):
        # a comparison's own command goes on
        begun = (home / "out" / "config.json").exists() and not comparison
        go_on = ["--resume", "out", "--device", "cpu"] if begun else [*argv, "--out", "out"]
        (home / "doing").write_text("")
        process = fork.Process(target=child, args=(module, go_on, home))
        process.start()
        return process

    def end(process, home: Path) -> bool:
        process.join()
        said = (home / "said.txt").read_text().strip().splitlines()[-1:]
        # killed after the file was there
        good = process.exitcode == 0 or "there is nothing to resume" in str(said)
        if not good:
            tally.lost.append(f"{name}, run {tally.runs}, exit {process.exitcode}: {said}")
        return good

    peace = folder / "peace"
    peace.mkdir(parents=True)
    begin = time.perf_counter()
    if not end(start(peace), peace):
        return tally
    length, expected = time.perf_counter() - begin, left(peace, comparison)
    while tally.kills < kills:
        tally.runs += 1
        home, here, ended = folder / f"run-{tally.runs}", 0, False
        home.mkdir()
        while here < each and tally.kills < kills and not ended:
            process, begun = start(home), time.time()
            aims = AIMS.get(name, AIMS["trainer"])
            aim = dice.choice(list(aims)) if dice.random() < 0.5 else None
            now = functools.partial(*((writing, home, begun) if comparison else (doing, home)))
            while aim and process.is_alive() and now()[0] != aim:
                time.sleep(0.02 if comparison else 0.0002)
            process.join(dice.uniform(0, aims.get(aim, 0.6 * length)))
            if ended := not process.is_alive():
                break
            process.kill()
            process.join()
            here, tally.kills = here + 1, tally.kills + 1
            what, step = now()
            tally.moments[what or "starting"] += 1
            tally.steps += [step] if what not in ("", "starting", "opening") else []
            try:
                for file in home.rglob("log.jsonl"):
                    log(file)
            except ValueError as e:
                tally.different.append(f"{name}, run {tally.runs}, killed in {what}: {e}")
        if not end(process if ended else start(home), home):
            continue
        found = left(home, comparison)
        if wrong := [k for k in expected | found if k not in expected or expected[k] != found.get(k)]:
            tally.different.append(f"{name}, run {tally.runs}: {', '.join(wrong)}")
    return tally


def table(tallies: dict[str, Tally]) -> str:
    rows = ["| | kills | runs | at steps | during | lost | different |", "|---|---|---|---|---|---|---|"]
    for name, t in tallies.items():
        during = ", ".join(f"{what} {n}" for what, n in t.moments.most_common())
        steps = f"{min(t.steps)} to {max(t.steps)}" if t.steps and max(t.steps) else ""
        rows.append(
            f"| {name} | {t.kills} | {t.runs} | {steps} | {during} | {len(t.lost)} | {len(t.different)} |"
        )
    return "\n".join(rows)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = "in all, one in nine for the comparison (default: 100)"
    p.add_argument("--kills", type=int, default=100, help=told)
    p.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    p.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = p.parse_args()
    # a start of it takes many seconds
    shares = {name: 0.5 if name == "comparison" else 1.0 for name in args.only}
    kills = {name: round(args.kills * s / sum(shares.values())) for name, s in shares.items()}
    kills[args.only[0]] += args.kills - sum(kills.values())
    tallies, start = {}, time.perf_counter()
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            tallies[name] = killed(name, kills[name], Path(folder), args.seed)
        seconds = time.perf_counter() - start
        print(f"{seconds:6.0f} s  {name}: {kills[name]} kills", file=sys.stderr, flush=True)
    print(table(tallies))
    wrong = [w for t in tallies.values() for w in t.lost + t.different]
    print("\n".join(wrong) or f"{sum(t.kills for t in tallies.values())} kills: none lost, none different")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
