"""Every number of a comparison's report, from the scores of its pictures.

    several trainings   Student's t over one value per training seed
    one training        Student's t, or Wilson's for shares, over its pictures; another may differ more
    between methods     paired by photos, noise and order: differences per seed, Holm's correction over pairs

`summarise(results)`: `results` is the manifest with the finished cells. Read next:
hanokdiff/compare/report.py (the page).
"""

import itertools
import math
from collections import Counter

import numpy as np

from hanokdiff.scoring.stats import holm, mean_interval, share_interval, t_tail

TEXTS = {"literal": "as asked", "words": "subject's words", "context": "context only"}
SHARES = ("subject", "wanted", "both")
MEANS = ("likeness", "nearest", *(f"{score}_{text}" for score in ("cosine", "clipscore") for text in TEXTS))


# ---------------------------------------------------------------------------------------------- statistics


def estimate(seeds: list[list[float]], share: bool = False) -> list:
    """[value, low, high] at 95 % from the values of every picture, a list for each training seed."""
    if len(seeds) > 1:
        found = mean_interval([np.mean(values) for values in seeds])
    elif share:
        found = share_interval(int(sum(seeds[0])), len(seeds[0]))
    else:
        found = mean_interval(seeds[0])
    return [None if math.isnan(v) else round(float(v), 6) for v in found]


def difference(a: dict, b: dict) -> tuple[list, float | None]:
    """([mean, low, high], p) of a - b, both {(seed, question, index): value}; p is None with a single
    training."""
    common = sorted(a.keys() & b.keys())
    seeds = sorted({seed for seed, _, _ in common})
    gaps = [[a[k] - b[k] for k in common if k[0] == seed] for seed in seeds]
    found = estimate(gaps)
    if len(seeds) < 2:
        return found, None
    means = np.array([np.mean(g) for g in gaps])
    error = means.std(ddof=1) / math.sqrt(len(means))
    if error < 1e-12:  # the same difference in every training
        return found, 1.0 if abs(means.mean()) < 1e-12 else 0.0
    return found, t_tail(means.mean() / error, len(means) - 1)


# ------------------------------------------------------------------------------------------------- summary


def counted(settings: dict) -> list[str]:
    """The keys of the prompts that are counted: not the pseudo word alone, not the fused readings."""
    return [q["key"] for q in settings["questions"] if q["key"] != "word" and not q["literal_tokens"]]


def groups(results: dict) -> dict[tuple, list[dict]]:
    """(method, photos, what was asked for) -> its cells, one for each training seed."""
    out: dict[tuple, list[dict]] = {}
    for cell in results["cells"]:
        out.setdefault((cell["method"], cell["photos"], cell["ask"]), []).append(cell)
    return out


def summarise(results: dict) -> dict:
    """Every number of the report."""
    rows = []
    for (method, photos, ask), cells in groups(results).items():
        limit = results["references"]["nearest_95"].get(str(photos))
        for name in ["all", *(q["key"] for q in cells[0]["prompts"])]:
            keys = counted(results["settings"]) if name == "all" else [name]
            head = {"method": method, "photos": photos, "ask": ask, "question": name}
            rows.append(head | summarise_group(cells, keys, limit, results["settings"]["kinds"]))
    at, pairs = compare_pairs(results)
    return {"rows": rows, "pairs": pairs, "pairs_at": at, "learning": learning_curves(results)}


def summarise_group(cells: list[dict], keys: list[str], limit: float | None, kinds) -> dict:
    """Of the pictures of these prompts; `limit` is the `nearest` above which a copy is suspected."""
    images = [[image for image in c["images"] if image["question"] in keys] for c in cells]
    total = sum(map(len, images))
    found: dict = {"trainings": len(cells), "pictures": total}
    for name in (*SHARES, *MEANS):
        found[name] = estimate([[image[name] for image in of] for of in images], share=name in SHARES)
    if limit is not None:
        above = [[float(image["nearest"] > limit) for image in of] for of in images]
        found["copies"] = estimate(above, share=True)
    diversity = [c["diversity"][k] for c in cells for k in keys if k in c["diversity"]]
    found["diversity"] = round(float(np.mean(diversity)), 6) if diversity else None
    count = Counter(image["kind"] for of in images for image in of)
    return found | {"kinds": {k: count[k] / total for k in kinds if count[k]}}


def compare_pairs(results: dict) -> tuple[int, list[dict]]:
    """(number of photos, every pair of methods there): the difference in the share of pictures with both."""
    settings = results["settings"]
    sizes, keys = sorted(settings["sizes"]), counted(settings)
    at = 50 if 50 in sizes else sizes[len(sizes) // 2]
    both: dict[str, dict] = {m: {} for m in settings["methods"]}
    for c in results["cells"]:
        for image in c["images"] if c["photos"] == at else []:
            if image["question"] in keys:
                both[c["method"]][c["seed"], image["question"], image["index"]] = image["both"]
    pairs = []
    for a, b in itertools.combinations(settings["methods"], 2):
        if both[a].keys() & both[b].keys():
            gap, p = difference(both[a], both[b])
            pairs.append({"a": a, "b": b, "difference": gap, "p": p})
    if pairs and all(pair["p"] is not None for pair in pairs):
        for pair, p in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
            pair["p_holm"] = p
    return at, pairs


def learning_curves(results: dict) -> list[dict]:
    """The loss of the held-out photos along the training, the mean over its seeds, and where it was
    lowest."""
    out = []
    for (method, photos, _), cells in groups(results).items():
        curves = [c["held_out"] for c in cells if c["held_out"] and None not in (v for _, v in c["held_out"])]
        steps = [[step for step, _ in curve] for curve in curves]
        if curves and all(s == steps[0] for s in steps):
            losses = np.mean([[loss for _, loss in curve] for curve in curves], axis=0)
            curve = [[step, round(float(loss), 6)] for step, loss in zip(steps[0], losses)]
            best = min(curve, key=lambda point: point[1])
            head = {"method": method, "photos": photos, "trainings": len(curves)}
            out.append(head | {"curve": curve, "best": best})
    return out


def find(summary: dict, method: str, photos: int, question: str = "all") -> dict | None:
    wanted = method, photos, question
    return next((r for r in summary["rows"] if (r["method"], r["photos"], r["question"]) == wanted), None)
