"""The page of a comparison, first part: what was found, in words, charts, tables and pictures.

Read next: hanokdiff/compare/appendix.py (the rest of the page), chart.py (what a page is made of).
"""

from collections import Counter
from pathlib import Path

from PIL import Image

from hanokdiff import chart
from hanokdiff.compare import korean
from hanokdiff.compare.summary import LEAST_SETS, SHARES, counted, find, point
from hanokdiff.images import labelled_sheet

# --------------------------------------------------------------------------------------------------- words


def percent(v: list | None) -> str:
    """12 % [7, 20] of [value, low, high]"""
    if not v:
        return ""
    interval = "" if v[1] is None else f" [{100 * v[1]:.0f}, {100 * v[2]:.0f}]"
    return f"{100 * v[0]:.0f} %{interval}"


def points(v: list) -> str:
    """+12 [+7, +20] of a difference, in percentage points."""
    interval = "" if v[1] is None else f" [{100 * v[1]:+.0f}, {100 * v[2]:+.0f}]"
    return f"{100 * v[0]:+.0f}{interval}"


def decimal(v: list | None) -> str:
    """0.123 [0.101, 0.145]"""
    if not v:
        return ""
    return f"{v[0]:.3f}" + ("" if v[1] is None else f" [{v[1]:.3f}, {v[2]:.3f}]")


def each(values: list[float]) -> str:
    """Every set's share, in percent."""
    return " ".join(f"{100 * v:.0f}" for v in values)


def first(labels: dict) -> str:
    """The label that is wanted."""
    return next(iter(labels))


def name_of(r: dict) -> str:
    """A row's recipe, or what the untouched model was asked for, and the point if it is not the usual one."""
    if not r["photos"]:
        return f'untouched, "{r["ask"]}"'
    more = [f"{100 * r['at']:.0f} % of the steps"] * (r["at"] < 1)
    more += [f"strength {r['strength']:g}"] * (r["strength"] != 1)
    return ", ".join([r["recipe"], *more])


def certainty(settings: dict) -> str:
    seeds = settings["seeds"]
    if len(seeds) == 1:
        return (
            "One set of photos and one training per cell. Intervals (95 %) are over its pictures only: they "
            "say how far other pictures of the same training would differ; another training may differ by "
            "far more."
        )
    whose = "with the same photos" if settings["same_photos"] else "each with its own photos"
    return (
        f"{len(seeds)} trainings per cell at most (sets {', '.join(map(str, seeds))}), {whose}, start, order "
        "and noise. Intervals (95 %): a bootstrap over these sets, then over pictures. Every dot is one "
        "training."
    )


def budget(results: dict) -> str:
    settings, steps = results["settings"], {}
    for c in results["cells"]:
        if c["photos"]:
            steps.setdefault(c["recipe"], {})[c["photos"]] = c["steps"]
    rule = "the same optimiser steps for every number of photos, but each recipe its own"
    if settings["budget"] == "epochs":
        at = settings["epochs_at"]
        rule = f"the same passes over the photos for every number of them, as the steps make over {at}"
    parts = []
    for name, by_photos in steps.items():
        counts = ", ".join(f"{k} for {n} photos" for n, k in by_photos.items())
        same = len(set(by_photos.values())) == 1
        parts.append(f"{name} {next(iter(by_photos.values())) if same else counts}")
    return f"Budget: {rule}. Steps: {'; '.join(parts) or 'none yet'}."


# ------------------------------------------------------------------------------------------------ sections


class View:
    """The results, and what every section needs of them."""

    def __init__(self, out: Path, results: dict, summary: dict, images: list[dict]):
        self.out, self.results, self.summary, self.images = out, results, summary, images
        self.settings = s = results["settings"]
        self.recipes, self.sizes, self.keys = list(s["recipes"]), sorted(s["sizes"]), counted(s)
        self.size_names = [f"{n} photos" for n in self.sizes]
        self.kind, self.condition = first(s["kinds"]), first(s["conditions"])
        self.checks = results["references"]
        self.at = summary["at"]  # number of photos at which recipes are compared
        self.trained = [c for c in results["cells"] if c["photos"] and (c["at"], c["strength"]) == (1, 1)]
        self.untouched = [c for c in results["cells"] if not c["photos"]]
        self.first_set = [c for c in self.trained if c["seed"] == s["seeds"][0]]
        title = "Teaching a model one subject" + (", a quick look" if s["quick"] else "")
        refresh, language = 20 if results["missing"] else 0, s.get("language", "en")
        self.page = chart.Page(title, refresh, language, korean.say if language == "ko" else str)

    def rows(self, *questions: str) -> list[dict]:
        """The rows of these questions, each recipe as it is: at its last step and at full strength."""
        return [
            r
            for r in self.summary["rows"]
            if r["question"] in questions and (r["at"], r["strength"]) == (1, 1)
        ]

    def by_size(self, recipe: str, question: str = "all") -> list[dict | None]:
        return [find(self.summary, recipe, n, question) for n in self.sizes]

    def tile(self, cell: dict | None, question: str) -> list[Path]:
        """The first four pictures of a cell and prompt, if they are here."""
        if not cell or question not in cell["asked"]:
            return []
        folder, key = self.out / cell["folder"] / cell["pictures"], question.replace(" ", "-")
        return [f for i in range(4) if (f := folder / f"{key}-{i:04d}.png").is_file()]


class Answers(View):
    """Each section is a method that adds its blocks to the page."""

    def write(self) -> None:
        self.opening()
        self.in_short()
        self.differences()
        self.frontier()
        self.pictures()
        self.presence()
        self.taken_for()
        self.failures()

    def opening(self) -> None:
        s, page, missing = self.settings, self.page, self.results["missing"]
        if missing:
            done = len(self.results["cells"])
            names = "; ".join(missing[:12]) + ("; ..." if len(missing) > 12 else "")
            page.text(f"UNFINISHED: {done} of {done + len(missing)} cells are done. Missing: {names}.")
        if s["quick"]:
            page.text("""A QUICK LOOK, not a result: --quick trains with half of each recipe's steps and
                draws few pictures, with half the sampling steps. Run without it before you believe anything
                here.""")
        drawing = s["drawing"]
        page.text(f"""Model `{s["model"]}`, photos: {s["data"]}; {s["n"]} pictures for each cell and prompt,
            drawn by {drawing["sampler"]} in {drawing["steps"]} steps with guidance {drawing["cfg"]:g} at
            {drawing["size"]} px, from the same noise for every recipe and size. Scored by CLIP
            `{s["scorer"]}`. {budget(self.results)}""")
        page.text(certainty(s))
        page.text("""A recipe is a method with all its options; two recipes of one method may differ by
            more than two methods do.""")
        rows = [
            [name, f"train_{words} ".replace(" ", ".py ", 1).strip()] for name, words in s["recipes"].items()
        ]
        page.table(["recipe", "options (the rest: the script's defaults)"], rows)

    def in_short(self) -> None:
        page, several = self.page, len(self.settings["seeds"]) > 1
        page.heading("In short")
        found = [(name, r) for name in self.recipes if (r := find(self.summary, name, self.at))]
        found.sort(key=lambda x: -x[1]["both"][0])
        if found:
            shares = "; ".join(f"{name} {percent(r['both'])}" for name, r in found)
            page.text(f"""Asked for the subject and for {self.settings["context"]} after {self.at} photos, the
                share of pictures that are recognised both as "{self.kind}" and as "{self.condition}":
                {shares}.""")
        untouched = [r for r in self.rows("all") if not r["photos"]]
        if untouched:
            shares = "; ".join(f'"{r["ask"]}" {percent(r["both"])}' for r in untouched)
            page.text(f"The untouched model, asked in these words: {shares}.")
        rows = [[m, *(percent(r and r["both"]) for r in self.by_size(m))] for m in self.recipes]
        page.table(["both at once, all prompts", *self.size_names], rows)
        captions = f"recognised as {self.kind}", f"recognised as {self.condition}", "both at once"
        for share, caption in zip(SHARES, captions if found else ()):
            values = [[r and (r[share], r[f"{share}_each"]) for r in self.by_size(m)] for m in self.recipes]
            svg = chart.dots(self.size_names, self.recipes, values, "share of pictures, %")
            caption = f"""Pictures {caption}, all prompts together: a dot for each training, a bar for their
                mean, a line for its 95 % interval."""
            caption = " ".join(caption.split())
            page.chart(svg, self.out / "charts" / f"{share}.svg", caption)
        if several:
            page.text("""A training works or it fails: shares are two-humped, and a mean hides that.
                Failed: a joint share under half of the recipe's median. Each number is one training's
                joint share in percent.""")
            rows = []
            for m in self.recipes:
                for r in filter(None, self.by_size(m)):
                    k, n, low, high = r["failures"]
                    failed = f"{k} of {n} [{100 * low:.0f}, {100 * high:.0f}] %"
                    sets = " ".join(map(str, r["sets"]))
                    rows.append([m, r["photos"], sets, each(r["both_each"]), failed])
            page.table(["recipe", "photos", "sets", "joint share of each, %", "failed"], rows)

    def differences(self) -> None:
        tests = self.summary["tests"]
        if not tests:
            return
        self.page.heading("Differences")
        self.page.text(f"""Differences in the share of pictures with both, in percentage points, set by
            set: same photos, same order and noise in training, same noise in drawing. p: the signs of
            the sets' differences flipped in every way (two-sided); so many sets cannot give less than
            the floor. Holm's correction within each family; the families were named before anything was
            trained. Below {LEAST_SETS} sets no test is made.""")
        for name, rows in tests.items():
            self.page.text(f"Family: {name}.")
            table = []
            for row in rows:
                p = ["no test", "", ""]
                if row["p"] is not None:
                    p = [f"{row[k]:.4f}" if k in row else "" for k in ("p", "floor", "p_holm")]
                table.append([row["question"], points(row["difference"]), each(row["each"]), *p])
            self.page.table(["question", "points", "each set", "p", "floor", "p, Holm"], table)

    def frontier(self) -> None:
        """Subject against condition, over steps and strengths of the same trainings."""
        best = self.summary["best_points"]
        if not best:
            return
        page = self.page
        page.heading("Steps and strengths")
        page.text(f"""One training, drawn at several of its steps and strengths: more of the subject is
            less of the condition. Each line joins the points of one recipe at {self.at} photos, by
            strength. The best point of each is chosen on development prompts ("development" below),
            which are no part of the result beside it.""")
        lines = {}
        for r in self.summary["rows"]:
            if r["question"] == "all" and r["photos"] == self.at:
                lines.setdefault((r["recipe"], r["at"]), []).append(
                    (r["strength"], r["subject"][0], r["wanted"][0])
                )
        steps = len(self.settings["at"]) > 1
        names = [recipe + f", {100 * at:.0f} %" * steps for recipe, at in lines]
        svg = chart.frontier(
            names, [[p[1:] for p in sorted(line)] for line in lines.values()], self.kind, self.condition
        )
        caption = "Share of pictures with the subject against those with the condition."
        page.chart(svg, self.out / "charts" / "frontier.svg", caption)
        rows = [
            [name_of({**b, "ask": ""}), b["photos"], percent(b["development"]), percent(b["both"])]
            for b in best
        ]
        page.table(["best point", "photos", "development, both", "prompts, both"], rows)
        chosen = {point(b) for b in best}
        rows = [
            [name_of(r), r["photos"], *(percent(r[k]) for k in SHARES), "best" * (point(r) in chosen)]
            for r in self.summary["rows"]
            if r["question"] == "all" and r["photos"]
        ]
        page.table(["point", "photos", self.kind, self.condition, "both", ""], rows)

    def pictures(self) -> None:
        """The paper's figures: photos down, recipes across; then the untouched model."""
        page, grids = self.page, self.out / "grids"
        cells = {(c["recipe"], c["photos"]): c for c in self.first_set}
        page.heading("Pictures")
        page.text(f"""The first four of each cell, not chosen, of set {self.settings["seeds"][0]}. The
            same place shows the same noise.""")
        pages = {f"{m}, {n}": f"{c['folder']}/run/index.html" for (m, n), c in cells.items()}
        if pages := {name: to for name, to in pages.items() if (self.out / to).is_file()}:
            page.links("Every training has a page of its own:", pages)
        for q in self.settings["questions"]:
            tiles = [[self.tile(cells.get((m, n)), q["key"]) for m in self.recipes] for n in self.sizes]
            if not (q["literal_tokens"] or q["development"]) and any(tile for row in tiles for tile in row):
                image = chart.sheet(tiles, self.size_names, self.recipes)
                caption = f'Prompt {q["key"]}: "{q["prompt"]}". Photos down, recipes across.'
                page.picture(image, grids / f"{q['key']}.png", caption)
        tiles = [[self.tile(c, k) for k in self.keys] for c in self.untouched]
        if any(tile for row in tiles for tile in row):
            columns = [f"Prompt {k}" for k in self.keys]
            image = chart.sheet(tiles, [c["ask"] for c in self.untouched], columns)
            caption = "The untouched model, asked in the words at the left."
            page.picture(image, grids / "untouched.png", caption)

    def presence(self) -> None:
        page, s = self.page, self.settings
        kinds, conditions = (
            ", ".join(f'"{text}"' for text in s[c].values()) for c in ("kinds", "conditions")
        )
        page.heading("Is it there?")
        page.text(f"""Recognised as X: of these texts, X fits the picture best. Kinds: {kinds}. Conditions:
            {conditions}. Both at once is what the application needs.""")
        rows = [
            [name_of(r), r["photos"] or "", r["question"], r["pictures"], *(percent(r[k]) for k in SHARES)]
            for r in self.rows("all", "word", *self.keys)
        ]
        columns = ["recipe", "photos", "prompt", "pictures", self.kind, self.condition, "both"]
        page.table(columns, rows)

    def taken_for(self) -> None:
        page, s = self.page, self.settings
        page.heading("What else it is taken for")
        page.text("""All prompts together, in percent. What is nowhere half a percent has no column. A
            campfire beside the house instead of a house on fire is the failure that the paper of 2023
            describes.""")
        for what in ("kinds", "conditions"):
            of_all = self.rows("all")
            labels = [k for k in s[what] if any(r[what].get(k, 0) >= 0.005 for r in of_all)]
            rows = [
                [name_of(r), r["photos"] or "", *(f"{100 * r[what].get(k, 0):.0f}" for k in labels)]
                for r in of_all
            ]
            page.table(["recipe", "photos", *labels], rows)

    def failures(self) -> None:
        """One picture of each, by a rule that leaves no choice: the clearest by the scores of images.csv."""
        page, usual = self.page, [i for i in self.images if (i["at"], i["strength"]) == (1, 1)]
        usual = [i for i in usual if i["photos"] and (self.out / i["file"]).is_file()]
        own = [i for i in usual if i["question"] in self.keys]
        lacking = [i for i in own if i["subject"] and not i["wanted"]]
        other = [i for i in own if i["wanted"] and not i["subject"]]
        copies = [i for i in usual if i["copy"] and i["question"] in (*self.keys, "word")]
        chosen = clearest(lacking, "condition", "likeness", 3)
        chosen += clearest(other, "kind", "likeness", 2, least=True) + clearest(copies, "copy", "nearest", 1)
        page.heading("One picture of each failure")
        page.text(f"""Of {len(own)} pictures of the prompts, by the scores in images.csv. The subject without
            what was asked for: of the three conditions seen most often instead, the picture most like the
            held-out photos. What was asked for on another building: of the two kinds seen most often, the
            picture least like them. A suspected copy, also with the word alone: the picture nearest to
            a training photo.""")
        if not chosen:
            page.text("There is none of them.")
            return
        rows, pictures = [], []
        for n, (i, count) in enumerate(chosen, 1):
            with Image.open(self.out / i["file"]) as picture:
                pictures.append(picture.convert("RGB"))
            near = f"{i['nearest']:.3f}" if i["copy"] else ""
            where = [i["recipe"], i["photos"], i["seed"], i["question"], i["index"]]
            rows.append([n, count, i["kind"], i["condition"], near, *where])
        sheet = labelled_sheet([pictures], [""], [f"{n}: {r[2]}, {r[3]}" for n, r in enumerate(rows, 1)])
        caption = "The clearest picture of each failure; where it is from stands in the table."
        page.picture(sheet, self.out / "grids" / "failures.png", caption)
        columns = "picture,such pictures,recognised as,and as,nearest photo,recipe,photos,set,prompt,number"
        page.table(columns.split(","), rows)


def clearest(images: list[dict], label: str, score: str, most: int, least=False) -> list[tuple[dict, int]]:
    """Of each of the most frequent labels, the picture with the highest (or least) score, and how many have
    that label."""
    counts = Counter(i[label] for i in images)
    pick = min if least else max
    return [
        (pick((i for i in images if i[label] == name), key=lambda i: i[score]), n)
        for name, n in counts.most_common(most)
    ]
