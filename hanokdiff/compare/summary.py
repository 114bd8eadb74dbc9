"""Every number of a comparison's report, from what each cell has found (results.collect).

    a share or a score      mean over sets; its 95 % interval by a bootstrap over sets, then pictures
    failures                sets whose joint share is under half of the recipe's median: trainings work or
    fail a difference            set by set, from the same photos, noise and order; p by flipping signs over
    sets, Holm's correction within the family that was named before anything was trained

`summarise(results)`: `results` is the manifest with the finished cells, and results.json holds it. Read next:
hanokdiff/scoring/stats.py (the intervals), hanokdiff/compare/sections.py (the page).
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from hanokdiff.compare.recipes import middle
from hanokdiff.scoring.stats import holm, mean_over_sets, share_interval, share_over_sets, sign_flip

TEXTS = {"literal": "as asked", "words": "subject's words", "context": "context only"}
SHARES = ("subject", "wanted", "both")
LEAST_SETS = 5  # for a test: fewer cannot give a p below 0.125


def counted(settings: dict) -> list[str]:
    """The keys of the prompts that are counted: not the pseudo word alone, the fused readings or
    development."""
    return [
        q["key"]
        for q in settings["questions"]
        if q["key"] != "word" and not q["literal_tokens"] and not q["development"]
    ]


def development(settings: dict) -> list[str]:
    return [q["key"] for q in settings["questions"] if q["development"]]


def groups(cells: list[dict]) -> dict[tuple, list[dict]]:
    """(recipe, photos, at, strength) -> its cells, one for each set."""
    out: dict[tuple, list[dict]] = {}
    for cell in cells:
        out.setdefault((cell["recipe"], cell["photos"], cell["at"], cell["strength"]), []).append(cell)
    return out


def rounded(values: Iterable[float]) -> list[float]:
    return [round(float(v), 6) for v in values]


def summarise(results: dict) -> dict:
    """Every number of the report."""
    settings, rows = results["settings"], []
    for (recipe, photos, at, strength), cells in groups(results["cells"]).items():
        head = {"recipe": recipe, "photos": photos, "at": at, "strength": strength, "ask": cells[0]["ask"]}
        names = {"all": counted(settings), "development": development(settings)}
        names |= {key: [key] for key in cells[0]["asked"]}
        for name, keys in names.items():
            if keys and set(keys) <= cells[0]["found"].keys():
                rows.append(head | {"question": name} | summarise_group(cells, keys))
    return {
        "rows": rows,
        "at": middle(settings["sizes"]),
        "tests": tests(results),
        "best_points": best_points(rows),
        "learning": learning_curves(results),
    }


def summarise_group(cells: list[dict], keys: list[str]) -> dict:
    """Of the pictures of these prompts, over the sets."""
    found: dict = {"sets": [c["seed"] for c in cells]}
    each = [[c["found"][k] for k in keys] for c in cells]  # of each set, what each prompt has found
    n = [sum(f["pictures"] for f in of) for of in each]
    found["pictures"] = sum(n)
    for name in (*SHARES, "copy"):
        k = [sum(f[name] for f in of) for of in each]
        found[name] = rounded(share_over_sets(list(zip(k, n, strict=True))))
        if name in SHARES:
            found[f"{name}_each"] = rounded(a / b for a, b in zip(k, n, strict=True))
    for name in [name for name, v in each[0][0].items() if isinstance(v, list)]:
        found[name] = rounded(mean_over_sets([(*pooled(of, name), m) for of, m in zip(each, n, strict=True)]))
    diversity = [f["diversity"] for of in each for f in of if f["diversity"] is not None]
    found["diversity"] = round(float(np.mean(diversity)), 6) if diversity else None
    found["failures"] = failures(found["both_each"])
    for name in ("kinds", "conditions"):
        count = sum((Counter(f[name]) for of in each for f in of), Counter())
        found[name] = {label: k / found["pictures"] for label, k in count.most_common()}
    return found


def pooled(of: list[dict], name: str) -> tuple[float, float]:
    """(mean, standard deviation) of the pictures of several prompts, from those of each."""
    n, m, s = (np.array(v, float) for v in zip(*((f["pictures"], *f[name]) for f in of), strict=True))
    mean = (n * m).sum() / n.sum()
    squares = ((n - 1) * s**2 + n * (m - mean) ** 2).sum()
    return mean, float(np.sqrt(squares / max(1, n.sum() - 1)))


def failures(each: list[float]) -> list:
    """[how many, of how many sets, low, high]: under half of the median; the interval is Wilson's share."""
    k = int((np.array(each) < np.median(each) / 2).sum())
    return [k, len(each), *rounded(share_interval(k, len(each))[1:])]


def set_shares(results: dict, recipe: str, photos: int) -> dict[int, float]:
    """{set: share of pictures with both} of a recipe as it is, at the end and at full strength."""
    keys = counted(results["settings"])
    return {
        c["seed"]: sum(c["found"][k]["both"] for k in keys) / sum(c["found"][k]["pictures"] for k in keys)
        for c in results["cells"]
        if (c["recipe"], c["photos"], c["at"], c["strength"]) == (recipe, photos, 1, 1)
    }


def tests(results: dict) -> dict[str, list[dict]]:
    """Every family of contrasts: the differences set by set, their mean, p, and Holm's p within the
    family."""
    out = {}
    for name, contrasts in results["settings"]["families"].items():
        found = [row for c in contrasts if (row := contrast(results, c))]
        if found and all(row["p"] is not None for row in found):
            for row, p in zip(found, holm([row["p"] for row in found]), strict=True):
                row["p_holm"] = p
        if found:
            out[name] = found
    return out


def contrast(results: dict, asked: dict) -> dict | None:
    """The difference of two sides, each the mean over its recipes, in the sets that have all of them."""
    sides = [[set_shares(results, *where) for where in asked[side]] for side in ("a", "b")]
    common = sorted(set.intersection(*(set(s) for side in sides for s in side)))
    if not common:
        return None
    a, b = ([float(np.mean([s[n] for s in side])) for n in common] for side in sides)
    each = rounded(x - y for x, y in zip(a, b, strict=True))
    mean, low, high = mean_over_sets([(d, 0.0, 1) for d in each])
    interval = [mean, low, high] if len(each) > 1 else [mean, None, None]
    p, floor = sign_flip(each) if len(each) >= LEAST_SETS else (None, None)
    head = {"question": asked["question"], "a": asked["a"], "b": asked["b"], "sets": common}
    return head | {
        "each": each,
        "difference": [v if v is None else round(v, 6) for v in interval],
        "p": p,
        "floor": floor,
    }


def best_points(rows: list[dict]) -> list[dict]:
    """Where several steps or strengths were drawn: of each recipe the point with the most pictures of both in
    the development prompts, and what the prompts show there. They took no part in the choice."""
    out = []
    points = [r for r in rows if r["question"] == "development"]
    for recipe, photos in dict.fromkeys((r["recipe"], r["photos"]) for r in points):
        own = [r for r in points if (r["recipe"], r["photos"]) == (recipe, photos)]
        best = max(own, key=lambda r: (r["both"][0], r["at"], -abs(r["strength"] - 1)))
        shown = next(r for r in rows if r["question"] == "all" and point(r) == point(best))
        head = {k: best[k] for k in ("recipe", "photos", "at", "strength")}
        out.append(head | {"development": best["both"], "both": shown["both"]})
    return out


def point(row: dict) -> tuple:
    return row["recipe"], row["photos"], row["at"], row["strength"]


def learning_curves(results: dict) -> list[dict]:
    """The loss of the held-out photos along the training, the mean over its sets, and where it was lowest."""
    out = []
    for (recipe, photos, at, strength), cells in groups(results["cells"]).items():
        curves = [c["held_out"] for c in cells if c["held_out"] and None not in (v for _, v in c["held_out"])]
        steps = [[step for step, _ in curve] for curve in curves]
        if curves and all(s == steps[0] for s in steps) and (at, strength) == (1, 1):
            losses = np.mean([[loss for _, loss in curve] for curve in curves], axis=0)
            curve = [[step, round(float(loss), 6)] for step, loss in zip(steps[0], losses)]
            best = min(curve, key=lambda point: point[1])
            head = {"recipe": recipe, "photos": photos, "trainings": len(curves)}
            out.append(head | {"curve": curve, "best": best})
    return out


def find(summary: dict, recipe: str, photos: int, question: str = "all") -> dict | None:
    wanted = recipe, photos, 1, 1, question
    return next((r for r in summary["rows"] if (*point(r), r["question"]) == wanted), None)
