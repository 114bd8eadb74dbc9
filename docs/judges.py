"""Two judges on the same generated pictures: how far do they agree? (LOG, section 24)

    python -m hanokdiff.tiny.build clip --seed 1 --out runs/judge       another judge (10 minutes; it wants
                                                                        tiny/sd/tokenizer at runs/judge/sd)
    python -m hanokdiff.compare ...                                     a comparison, scored by the usual one
    cp runs/compare/images.csv runs/first.csv
    python -m hanokdiff.compare ... --clip runs/judge/clip              the same pictures, scored by the other
    python docs/judges.py runs/first.csv runs/compare/images.csv [COUNTS.json]
    python docs/judges.py features      can the judge be asked for the parts of a house (the paper's Table 1)?

Prompts A, B and C. Kappa is agreement beyond chance (Cohen 1960): (agreed - chance) / (1 - chance).
"""

import csv
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

WHAT = {"subject": "a hanok", "wanted": "on fire", "both": "both at once"}


def read(file: str) -> dict[str, dict]:
    with open(file, newline="", encoding="utf-8") as f:
        return {r["file"]: r for r in csv.DictReader(f) if r["question"] in ("A", "B", "C")}


def kappa(a: float, b: float, same: float) -> float:
    """Cohen's kappa of two judges' shares of yes and of agreement; nan where both say the same of all."""
    chance = a * b + (1 - a) * (1 - b)
    return (same - chance) / (1 - chance) if chance < 1 else float("nan")


def counts(one: dict, two: dict) -> list[dict]:
    """Of every recipe, number of photos, set and prompt: the pictures, each judge's yes, the agreements."""
    rows: dict[tuple, dict] = {}
    for file in sorted(one.keys() & two.keys()):
        r = one[file]
        key = (r["recipe"], int(r["photos"]), int(r["seed"]), r["question"])
        row = rows.setdefault(key, dict(zip(("recipe", "photos", "set", "prompt"), key)) | {"pictures": 0})
        row["pictures"] += 1
        for what in WHAT:
            a, b = int(r[what]), int(two[file][what])
            found = row.setdefault(what, [0, 0, 0])  # yes by the first, by the second, the same by both
            row[what] = [found[0] + a, found[1] + b, found[2] + (a == b)]
    return [rows[key] for key in sorted(rows)]


def main(first: str, second: str, *write: str) -> None:
    """Print the table; into a third file, if named, the counts."""
    rows = counts(read(first), read(second))
    if write:
        lines = ",\n".join(json.dumps(row) for row in rows)
        Path(*write).write_text(f"[\n{lines}\n]\n", "utf-8")
    groups = defaultdict(list)
    for row in rows:
        groups["all"].append(row)
        groups[f"{row['recipe']}, {row['photos']} photos"].append(row)
    print("recipe | pictures |", " | ".join(f"{w}: first, second, agree, kappa" for w in WHAT.values()))
    for name, group in groups.items():
        n, columns = sum(r["pictures"] for r in group), []
        for what in WHAT:
            a, b, same = (sum(r[what][k] for r in group) / n for k in range(3))
            columns.append(f"{a:.3f} {b:.3f} {same:.3f} {kappa(a, b, same):.2f}")
        print(f"{name} | {n} |", " | ".join(columns))


def features() -> None:
    """The parts of 200 drawn plain houses, and of 200 hanok, by the words that the world's captions have."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from hanokdiff.scoring.clip import Clip, presence
    from hanokdiff.tiny import scenes, world

    colours = {c: f"a house with {'an' if c == 'orange' else 'a'} {c} roof" for c in scenes.ROOF_COLOURS}
    asked = [  # in the order of a scene's attributes
        {w: f"a {w} house" for w in scenes.WIDTHS},
        colours,
        {f: f"a house with a {f} roof" for f in scenes.ROOFS},
        {c: f"a house with {c} walls" for c in scenes.WALL_COLOURS},
    ]
    judge = Clip()
    for kind in ("house", "hanok"):
        drawn = [world.scene(f"feat {i}", (kind,), ("none", "fire", "snow", "night")) for i in range(200)]
        images = judge.images([world.draw(s) for s in drawn])
        for i, texts in enumerate(asked):
            said = [list(texts)[k] for k in presence(images, judge.texts(list(texts.values())))]
            right = sum(s.attributes[i] == word for s, word in zip(drawn, said)) if kind == "house" else ""
            print(kind, right, Counter(said).most_common(4))


if __name__ == "__main__":
    features() if sys.argv[1:] == ["features"] else main(*sys.argv[1:])
