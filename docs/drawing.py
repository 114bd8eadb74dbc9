"""What can be done about the missing condition while drawing? (LOG, sections 17 and 25)

    python docs/drawing.py                     every way, with the trainings of docs/remedies.py, sets 1 to 4
    python docs/drawing.py --ways "as it is" "word after 0.2" --test

The same trainings, noise and counts as there; only the prompt, or what the sampler does with it, differs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import remedies

METHODS = ("ti", "hypernet + word + class", "lora + text + word + class")  # the defaults
RECIPES = {**remedies.RECIPES, "untouched": ("untouched", "", 1)}  # the base, to compare with
PLAIN = "a building"


def late(share: float):
    return lambda prompt, condition: prompt.replace("*", f"[{PLAIN}:*:{share}]")


def parts(weight: float):
    return lambda prompt, condition: f"* :{1 - weight:g} AND {prompt.replace('*', PLAIN)} :{weight:g}"


def emphasised(weight: float):
    return lambda prompt, condition: re.sub(rf"\b{condition}\b", f"({condition}:{weight})", prompt)


def insisted(weight: float):
    return lambda prompt, condition: prompt.replace("*", f"(*:{weight})")


def same(prompt: str, condition: str) -> str:
    return prompt


JAPANESE, CHINESE, WESTERN = "a japanese house", "a chinese pavilion", "a western house"
WAYS = {  # name -> (what becomes of a prompt, the artefact's strength, options of the drawing)
    "as it is": (same, 1, {}),
    **{f"word after {w}": (late(w), 1, {}) for w in (0.1, 0.2, 0.3, 0.4, 0.5)},
    **{f"AND {w}": (parts(w), 1, {}) for w in (0.3, 0.5)},
    **{f"emphasis {w}": (emphasised(w), 1, {}) for w in (1.3, 1.6)},
    **{f"word's emphasis {w}": (insisted(w), 1, {}) for w in (1.3, 1.6, 2)},
    **{f"strength {s}": (same, s, {}) for s in (0.7, 0.5)},
    **{f"attend {s}": (same, 1, {"attend_scale": s}) for s in (5, 20)},
    "without Japanese": (same, 1, {"negative": JAPANESE}),
    "without Chinese": (same, 1, {"negative": CHINESE}),
    "without western": (same, 1, {"negative": WESTERN}),
    "without the three": (same, 1, {"negative": f"{CHINESE}, {JAPANESE}, {WESTERN}"}),
    **{f"guidance {g}": (same, 1, {"cfg": g}) for g in (7, 10, 14)},
    "guidance 10, word's emphasis 1.6": (insisted(1.6), 1, {"cfg": 10}),
}


def cell(name: str, way: str, number: int, home: Path, test: bool) -> None:
    result = result_file(home, name, way, number, test)
    if result.exists():
        return
    from hanokdiff.scoring.clip import Clip
    from hanokdiff.tiny import build

    change, strength, extra = WAYS[way]
    method, options, _ = RECIPES[name]
    run = remedies.run_folder(home, method, options, number)
    remedies.train(method, options, number, run)
    if method in ("ti", "untouched") and strength != 1:
        return  # which has none
    sd, judge, out = remedies.trained_model(method, run, strength), Clip(), {}
    for place, (prompt, condition) in enumerate((remedies.TEST if test else remedies.DEVELOPMENT).items()):
        word = condition if condition in prompt else "fire"
        seeds = remedies.seeds(number, place + 1, test)
        how = {"cfg": 4.0, "attend": ("*", word) if "attend_scale" in extra else (), **extra}
        drawn = sd.draw([change(prompt, word)] * len(seeds), seeds, **how)
        out[prompt] = remedies.recognised(judge, build, drawn, condition)
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps({"recipe": name, "way": way, "set": number, "prompts": out}))


def result_file(home: Path, name: str, way: str, number: int, test: bool) -> Path:
    return home / "drawing" / f"{name}, {way} {number}{' test' if test else ''}.json"


def table(names: list[str], ways: list[str], sets: list[int], home: Path, test: bool) -> None:
    print("recipe | way | subject | condition | both | both, each set")
    for name in names:
        for way in ways:
            files = [result_file(home, name, way, n, test) for n in sets]
            rows = [json.loads(f.read_text())["prompts"] for f in files if f.exists()]
            if rows:
                means = [
                    np.mean([remedies.share(row, what) for row in rows]) for what in ("hanok", "condition")
                ]
                both = [remedies.share(row, "both") for row in rows]
                each = " ".join(f"{x:.2f}" for x in both)
                print(f"{name} | {way} | {means[0]:.2f} | {means[1]:.2f} | {np.mean(both):.2f} | {each}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipes", nargs="+", default=list(METHODS), choices=RECIPES)
    p.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    p.add_argument("--sets", nargs="+", type=int, default=[1, 2, 3, 4])
    p.add_argument("--test", action="store_true", help="draw A, B, C instead of the development prompts")
    p.add_argument("--out", type=Path, default=Path("runs/remedies"))
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    p.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        for way in args.ways:
            cell(args.recipes[0], way, args.sets[0], args.out, args.test)
        return

    def work(job: tuple[int, str]) -> None:
        argv = ["--recipes", job[1], "--sets", str(job[0]), "--ways", *args.ways, "--out", str(args.out)]
        more = ["--one", *["--test"] * args.test]
        subprocess.run([sys.executable, __file__, *argv, *more], env=remedies.environment(), check=False)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, [(number, name) for number in args.sets for name in args.recipes]))
    table(args.recipes, args.ways, args.sets, args.out, args.test)


if __name__ == "__main__":
    main()
