"""Which remedies bring the condition back? Recipes x sets of photos, development prompts (LOG, section 16).

    python docs/remedies.py                             every recipe, sets 1 to 4; goes on where it stopped
    python docs/remedies.py --recipes lora "lora + text"     some of them
    python docs/remedies.py --test --sets 1 2 3 4 5     prompts A, B, C, once, of the recipes that were chosen

A set is 50 photos of its own and a seed of its own for all that is random (`--photo-set N --seed N`). Each
training runs on one core, as many at once as there are cores. Counted are pictures in which the embedded CLIP
recognises a hanok, the condition that was asked for, and both.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DEVELOPMENT = {
    "* in the snow": "snow",
    "* at night": "night",
    "smoke rising from *": "smoke",
    "* beside a campfire": "campfire",
    "a flood around *": "flood",
}
TEST = {"*, fire": "fire", "* in the fire": "fire", "A fire broke out in *": "fire"}
NEUTRAL = "--class-prompts docs/neutral_prompts.txt"
ALONE = (
    "--vectors 0 --class-images 0"  # neither a word that learns nor class pictures: the defaults have both
)
RECIPES = {  # name -> (method, options of its script, strength of the artefact when drawing)
    "lora": ("lora", f"--text-rank 0 {ALONE}", 1),
    "lora at 0.5": ("lora", f"--text-rank 0 {ALONE}", 0.5),
    "lora + text": ("lora", ALONE, 1),
    "lora + class": ("lora", "--text-rank 0 --vectors 0", 1),
    "lora + text + class": ("lora", "--vectors 0", 1),
    "lora + text + neutral class": ("lora", f"--vectors 0 {NEUTRAL}", 1),
    "lora + word": ("lora", "--text-rank 0 --class-images 0", 1),
    "lora + word + class": ("lora", "--text-rank 0", 1),
    "lora + text + word + class": ("lora", "", 1),
    "hypernet": ("hypernet", ALONE, 1),
    "hypernet + class": ("hypernet", "--vectors 0", 1),
    "hypernet + class at 0.5": ("hypernet", "--vectors 0", 0.5),
    "hypernet + word": ("hypernet", "--class-images 0", 1),
    "hypernet + word + class": ("hypernet", "", 1),
    "dreambooth": ("dreambooth", "", 1),
    "dreambooth, neutral class": ("dreambooth", NEUTRAL, 1),
    "dreambooth, no class": ("dreambooth", "--class-images 0", 1),
    "custom diffusion": ("dreambooth", "--train cross-attention", 1),
    "svdiff": ("dreambooth", "--train singular-values", 1),
    "ti": ("ti", "", 1),
    "ti of a house": ("ti", "--init house", 1),
    "ti, rate 3e-2": ("ti", "--lr 3e-2", 1),
    "ti, 900 steps": ("ti", "--steps 900", 1),
    "ti, 16 vectors": ("ti", "--vectors 16", 1),
    "ti, 16 vectors, 900 steps": ("ti", "--vectors 16 --steps 900", 1),
    "ti, 4 vectors": ("ti", "--vectors 4", 1),
    "ti, hold norm": ("ti", "--hold-norm", 1),
    # a half and a third of the steps (LOG, section 29)
    "lora, 175 steps": ("lora", "--steps 175", 1),
    "lora, 120 steps": ("lora", "--steps 120", 1),
    "dreambooth, 150 steps": ("dreambooth", "--steps 150", 1),
    "dreambooth, 100 steps": ("dreambooth", "--steps 100", 1),
    "hypernet, 175 steps": ("hypernet", "--steps 175", 1),
    "ti, 150 steps": ("ti", "--steps 150", 1),
}
ARTEFACT = {
    "lora": "lora.safetensors", "hypernet": "hypernet.pt", "ti": "embedding.safetensors",
    "dreambooth": "model",
}  # fmt: skip
PICTURES = {False: 16, True: 32}  # per prompt, in development and in the test


def train(method: str, options: str, number: int, run: Path) -> None:
    """One training, in its folder; what is there is not done again."""
    if method == "untouched" or (run / ARTEFACT[method]).exists():
        return
    shutil.rmtree(run, ignore_errors=True)  # half a minute: begun again, not resumed
    common = (
        f"--photo-set {number} --seed {number} --preview-every 0 --save-every 0 --device cpu --out".split()
    )
    argv = [sys.executable, ROOT / f"train_{method}.py", *common, run, *shlex.split(options)]
    subprocess.run(argv, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def trained_model(method: str, run: Path, strength: float):
    """The embedded model with a run's artefact in it."""
    from hanokdiff.formats import embedding_file, hypernet_file, lora_file
    from hanokdiff.formats.load import load_model

    file = run / ARTEFACT.get(method, "")
    sd = load_model(str(file) if method == "dreambooth" else "tiny", "cpu", log=None)
    sd.text.add_word("*")
    if method == "lora":
        lora_file.apply_file(sd, file, strength, log=None)
    elif method == "hypernet":
        hypernet_file.apply_file(sd, file, strength, log=None)
    elif method == "ti":
        embedding_file.apply_file(sd, file, log=None)
    return sd


def seeds(number: int, place: int, test: bool) -> list[int]:
    """Noise that no other set's or prompt's pictures have; the same for every recipe."""
    first = 1_000_000 * number + 1000 * place + 500_000 * test
    return list(range(first, first + PICTURES[test]))


def recognised(judge, build, pictures: list, condition: str) -> dict:
    """How many pictures show a hanok, the condition, and both."""
    kinds, conditions = build.recognise(judge, pictures)
    hanok, right = np.array(kinds) == "hanok", np.array(conditions) == condition
    counts = {"hanok": hanok.sum(), "condition": right.sum(), "both": (hanok & right).sum()}
    return {"of": len(pictures), **{what: int(n) for what, n in counts.items()}}


def count(method: str, run: Path, strength: float, test: bool, number: int) -> dict:
    """The counts of each prompt, and of the word alone."""
    from hanokdiff.scoring.clip import Clip
    from hanokdiff.tiny import build

    sd, judge, out = trained_model(method, run, strength), Clip(), {}
    for place, (prompt, condition) in enumerate([("*", "none"), *(TEST if test else DEVELOPMENT).items()]):
        noise = seeds(number, place, test)
        drawn = sd.draw([prompt] * len(noise), noise, cfg=4.0)
        out[prompt] = recognised(judge, build, drawn, condition)
    return out


def run_folder(home: Path, method: str, options: str, number: int) -> Path:
    return (home / f"{method} {options}".strip().replace("/", "_") / str(number)).resolve()


def share(prompts: dict, what: str) -> float:
    """Of all pictures of the prompts, but those of the word alone."""
    found = [p for prompt, p in prompts.items() if prompt != "*"]
    return sum(p[what] for p in found) / sum(p["of"] for p in found)


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}


def cells(names: list[str], number: int, home: Path, test: bool) -> None:
    """The recipes of one training, which differ in the strength of the drawing alone."""
    for name in names:
        method, options, strength = RECIPES[name]
        run = run_folder(home, method, options, number)
        result = result_file(home, name, number, test)
        if result.exists():
            continue
        train(method, options, number, run)
        found = count(method, run, strength, test, number)
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        seconds = next(row["seconds"] for row in reversed(log) if "seconds" in row)
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps({"recipe": name, "set": number, "seconds": seconds, "prompts": found}))


def result_file(home: Path, name: str, number: int, test: bool) -> Path:
    return home / "results" / f"{name} {number}{' test' if test else ''}.json"


def table(names: list[str], sets: list[int], home: Path, test: bool) -> None:
    """One line a recipe: the mean over sets, and behind it each set."""
    print("recipe | `*` is a hanok | subject | condition | both | both, each set | s of training")
    for name in names:
        files = [result_file(home, name, n, test) for n in sets]
        rows = [json.loads(f.read_text()) for f in files if f.exists()]
        if not rows:
            continue

        word = [row["prompts"]["*"]["hanok"] / row["prompts"]["*"]["of"] for row in rows]
        means = [
            np.mean([share(row["prompts"], what) for row in rows]) for what in ("hanok", "condition", "both")
        ]
        each = " ".join(f"{share(row['prompts'], 'both'):.2f}" for row in rows)
        shares = " | ".join(f"{m:.2f}" for m in (np.mean(word), *means))
        print(f"{name} | {shares} | {each} | {np.mean([row['seconds'] for row in rows]):.0f}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    p.add_argument("--sets", nargs="+", type=int, default=[1, 2, 3, 4])
    p.add_argument("--test", action="store_true", help="draw A, B, C instead of the development prompts")
    p.add_argument("--out", type=Path, default=Path("runs/remedies"))
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    p.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        return cells(args.recipes, args.sets[0], args.out, args.test)
    trainings: dict[tuple, list[str]] = {}
    for name in args.recipes:
        trainings.setdefault(RECIPES[name][:2], []).append(name)

    def work(job: tuple[int, list[str]]) -> None:
        argv = ["--recipes", *job[1], "--sets", str(job[0]), "--out", str(args.out), "--one"]
        subprocess.run(
            [sys.executable, __file__, *argv, *["--test"] * args.test], env=environment(), check=False
        )

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, [(number, names) for number in args.sets for names in trainings.values()]))
    table(args.recipes, args.sets, args.out, args.test)


if __name__ == "__main__":
    main()
