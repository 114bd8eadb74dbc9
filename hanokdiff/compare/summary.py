"""Every number of a comparison's report, from the scores of its pictures.

    several trainings   Student's t over one value per training seed
    one training        Student's t, or Wilson's for shares, over its pictures: says nothing about another training
    between methods     paired by photos, noise and order: differences per seed, Holm's correction over all pairs

`summarise(results)`: `results` is the manifest with the finished cells. Read next: hanokdiff/compare/report.py (the
page).
"""

import itertools
import math
from collections import Counter

import numpy as np

from hanokdiff.scoring.stats import mean_interval, share_interval

TEXTS = {"literal": "as asked", "words": "subject's words", "context": "context only"}
SHARES = ("subject", "wanted", "both")


# ----------------------------------------------------------------------------------------------------- statistics


def estimate(seeds: list[list[float]], share: bool = False) -> list:
    """[value, low, high] at 95 % from the values of every picture, a list for each training seed."""
    if len(seeds) > 1:
        found = mean_interval([np.mean(values) for values in seeds])
    elif share:
        found = share_interval(int(sum(seeds[0])), len(seeds[0]))
    else:
        found = mean_interval(seeds[0])
    return [None if math.isnan(v) else round(float(v), 6) for v in found]


def t_tail(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's t. With T = sqrt(freedom) tan(angle) its density is cos(angle)^(freedom - 1)."""

    def area(low: float) -> float:
        density = np.cos(np.linspace(low, math.pi / 2, 20_001)) ** (freedom - 1)
        return (math.pi / 2 - low) * (density.sum() - (density[0] + density[-1]) / 2) / 20_000

    return float(area(math.atan(abs(t) / math.sqrt(freedom))) / area(0))


def holm(p: list[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the smallest times m, the next times m - 1, never falling."""
    out, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        out[i] = worst
    return out


def difference(a: dict, b: dict) -> tuple[list, float | None]:
    """([mean, low, high], p) of a - b, both {(seed, question, index): value}; p is None with a single training."""
    common = sorted(a.keys() & b.keys())
    seeds = sorted({k[0] for k in common})
    gaps = [[a[k] - b[k] for k in common if k[0] == s] for s in seeds]
    found = estimate(gaps)
    if len(seeds) < 2:
        return found, None
    means = np.array([np.mean(g) for g in gaps])
    error = means.std(ddof=1) / math.sqrt(len(means))
    if error < 1e-12:  # every training says the same
        return found, 1.0 if abs(means.mean()) < 1e-12 else 0.0
    return found, t_tail(means.mean() / error, len(means) - 1)


# -------------------------------------------------------------------------------------------------------- summary


def paper(settings: dict) -> list[str]:
    """The keys of the prompts that are counted: not the pseudo word alone, not the fused readings."""
    return [q["key"] for q in settings["questions"] if q["key"] != "word" and not q["literal_tokens"]]


def groups(results: dict) -> dict[tuple, list[dict]]:
    """(method, photos, what was asked for) -> its cells, one for each training seed."""
    out: dict[tuple, list[dict]] = {}
    for cell in results["cells"]:
        out.setdefault((cell["method"], cell["photos"], cell["ask"]), []).append(cell)
    return out


def values(cells: list[dict], name: str, asked: list[str]) -> list[list[float]]:
    return [[row[name] for row in c["images"] if row["question"] in asked] for c in cells]


def summarise(results: dict) -> dict:
    """Every number of the report."""
    settings, all_of = results["settings"], paper(results["settings"])
    rows = []
    for (method, photos, ask), cells in groups(results).items():
        for name in ["all", *(q["key"] for q in cells[0]["prompts"])]:
            asked = all_of if name == "all" else [name]
            row = {
                "method": method,
                "photos": photos,
                "ask": ask,
                "question": name,
                "trainings": len(cells),
                "pictures": sum(map(len, values(cells, "both", asked))),
            }
            for share in SHARES:
                row[share] = estimate(values(cells, share, asked), share=True)
            for mean in (
                "likeness",
                "nearest",
                *(f"{s}_{t}" for s in ("cosine", "clipscore") for t in TEXTS),
            ):
                row[mean] = estimate(values(cells, mean, asked))
            limit = results["references"]["nearest_95"].get(str(photos))
            if limit is not None:
                near = [[float(v > limit) for v in seed] for seed in values(cells, "nearest", asked)]
                row["copies"] = estimate(near, share=True)
            told = [c["diversity"][q] for c in cells for q in asked if q in c["diversity"]]
            row["diversity"] = round(float(np.mean(told)), 6) if told else None
            kinds = Counter(r["kind"] for c in cells for r in c["images"] if r["question"] in asked)
            row["kinds"] = {k: kinds[k] / row["pictures"] for k in settings["kinds"] if kinds[k]}
            rows.append(row)
    sizes = sorted(settings["sizes"])
    at = 50 if 50 in sizes else sizes[len(sizes) // 2]
    held: dict[str, dict] = {m: {} for m in settings["methods"]}
    for c in (c for c in results["cells"] if c["photos"] == at):
        told = {
            (c["seed"], r["question"], r["index"]): r["both"] for r in c["images"] if r["question"] in all_of
        }
        held[c["method"]].update(told)
    pairs = []
    for a, b in itertools.combinations(settings["methods"], 2):
        if held[a].keys() & held[b].keys():
            gap, p = difference(held[a], held[b])
            pairs.append({"a": a, "b": b, "difference": gap, "p": p})
    if pairs and all(pair["p"] is not None for pair in pairs):
        for pair, p in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
            pair["p_holm"] = p
    return {"rows": rows, "pairs": pairs, "pairs_at": at, "learning": learning(results)}


def learning(results: dict) -> list[dict]:
    """The loss of the held-out photos along the training, the mean over its seeds, and where it was lowest."""
    out = []
    for (method, photos, _), cells in groups(results).items():
        curves = [c["held_out"] for c in cells if c["held_out"] and None not in (v for _, v in c["held_out"])]
        if curves and all([s for s, _ in c] == [s for s, _ in curves[0]] for c in curves):
            curve = [
                [s, round(float(np.mean([c[i][1] for c in curves])), 6)] for i, (s, _) in enumerate(curves[0])
            ]
            best = min(curve, key=lambda point: point[1])
            out.append(
                {"method": method, "photos": photos, "trainings": len(curves), "curve": curve, "best": best}
            )
    return out


def find(
    summary: dict, method: str, photos: int, question: str = "all", ask: str | None = None
) -> dict | None:
    return next(
        (
            r
            for r in summary["rows"]
            if r["method"] == method
            and r["photos"] == photos
            and r["question"] == question
            and ask in (None, r["ask"])
        ),
        None,
    )
