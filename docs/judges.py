"""Two judges on the same generated pictures: how far do they agree? (LOG, section 24)

    python -m hanokdiff.tiny.build clip --seed 1 --out runs/judge       another judge (10 minutes; it wants
                                                                        tiny/sd/tokenizer at runs/judge/sd)
    python -m hanokdiff.compare ...                                     a comparison, scored by the usual one
    cp runs/compare/images.csv runs/first.csv
    python -m hanokdiff.compare ... --clip runs/judge/clip              the same pictures, scored by the other
    python docs/judges.py runs/first.csv runs/compare/images.csv

Prompts A, B and C. Kappa is agreement beyond chance (Cohen 1960): (agreed - chance) / (1 - chance).
"""

import csv
import sys
from collections import defaultdict

import numpy as np

WHAT = {"subject": "a hanok", "wanted": "on fire", "both": "both at once"}


def read(file: str) -> dict[str, dict]:
    with open(file, newline="", encoding="utf-8") as f:
        return {r["file"]: r for r in csv.DictReader(f) if r["question"] in ("A", "B", "C")}


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa of two columns of 0 and 1; not a number where both say the same of everything."""
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return ((a == b).mean() - chance) / (1 - chance) if chance < 1 else float("nan")


def main(first: str, second: str) -> None:
    one, two = read(first), read(second)
    groups = defaultdict(list)
    for file in one.keys() & two.keys():
        groups["all"].append(file)
        groups[f"{one[file]['recipe']}, {one[file]['photos']} photos"].append(file)
    print("recipe | pictures |", " | ".join(f"{w}: first, second, agree, kappa" for w in WHAT.values()))
    for name, files in groups.items():
        columns = []
        for what in WHAT:
            a, b = (np.array([int(judge[f][what]) for f in files]) for judge in (one, two))
            columns.append(f"{a.mean():.3f} {b.mean():.3f} {(a == b).mean():.3f} {kappa(a, b):.2f}")
        print(f"{name} | {len(files)} |", " | ".join(columns))


if __name__ == "__main__":
    main(*sys.argv[1:])
