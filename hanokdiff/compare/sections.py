"""The page of a comparison, section by section, in words, tables, charts and pictures.

Read next: hanokdiff/compare/chart.py (what a page is made of).
"""

from pathlib import Path

from hanokdiff.compare import chart
from hanokdiff.compare.summary import SHARES, TEXTS, counted, find

NAMES = {
    "ti": "Textual Inversion",
    "dreambooth": "DreamBooth",
    "lora": "LoRA",
    "hypernet": "Hypernetwork",
    "untouched": "untouched model",
}
COSTS = ("class", "training", "other", "sampling")  # seconds of


# --------------------------------------------------------------------------------------------------- words


def percent(v: list | None) -> str:
    """12 % [7, 20] of [value, low, high]"""
    if not v:
        return ""
    interval = "" if v[1] is None else f" [{max(0, 100 * v[1]):.0f}, {min(100, 100 * v[2]):.0f}]"
    return f"{100 * v[0]:.0f} %{interval}"


def decimal(v: list | None) -> str:
    """0.123 [0.101, 0.145]"""
    if not v:
        return ""
    return f"{v[0]:.3f}" + ("" if v[1] is None else f" [{v[1]:.3f}, {v[2]:.3f}]")


def first(labels: dict) -> str:
    """The label that is wanted."""
    return next(iter(labels))


def all_prompts(summary: dict) -> list[dict]:
    return [r for r in summary["rows"] if r["question"] == "all"]


def model_and_photos(r: dict) -> list:
    name = f'untouched, "{r["ask"]}"' if r["method"] == "untouched" else NAMES[r["method"]]
    return [name, r["photos"] or ""]


def certainty(settings: dict) -> str:
    n = len(settings["seeds"])
    if n > 1:
        seeds = ", ".join(map(str, settings["seeds"]))
        return f"Intervals: 95 %, Student's t over {n} trainings with seeds {seeds}."
    return (
        "Intervals: 95 %, one training, pictures only. They say how far other pictures of the same training "
        "would differ; another training may differ by more."
    )


def budget(results: dict) -> str:
    settings, steps = results["settings"], {}
    for c in results["cells"]:
        if c["method"] != "untouched":
            steps.setdefault(NAMES[c["method"]], {})[c["photos"]] = c["steps"]
    rule = "the same optimiser steps for every number of photos, but each method its own"
    if settings["budget"] == "epochs":
        at = settings["epochs_at"]
        rule = f"the same passes over the photos for every number of them, as the steps make over {at}"
    parts = []
    for name, by_photos in steps.items():
        each = ", ".join(f"{k} for {n} photos" for n, k in by_photos.items())
        same = len(set(by_photos.values())) == 1
        parts.append(f"{name} {next(iter(by_photos.values())) if same else each}")
    return f"Budget: {rule}. Steps: {'; '.join(parts) or 'none yet'}."


# ------------------------------------------------------------------------------------------------ sections


def compose(out: Path, results: dict, summary: dict) -> chart.Page:
    return Sections(out, results, summary).page


class Sections:
    """Each section is a method that adds its blocks to the page."""

    def __init__(self, out: Path, results: dict, summary: dict):
        self.out, self.results, self.summary = out, results, summary
        self.settings = s = results["settings"]
        self.methods, self.sizes, self.keys = s["methods"], sorted(s["sizes"]), counted(s)
        self.names = [NAMES[m] for m in self.methods]
        self.size_names = [f"{n} photos" for n in self.sizes]
        self.kind, self.condition = first(s["kinds"]), first(s["conditions"])
        self.checks = results["references"]
        self.at = summary["pairs_at"]  # number of photos at which the methods are compared
        self.trained = [c for c in results["cells"] if c["method"] != "untouched"]
        self.untouched = [c for c in results["cells"] if c["method"] == "untouched"]
        self.first_seed = [c for c in self.trained if c["seed"] == s["seeds"][0]]
        title = "Four ways to teach a model one subject" + (", a quick look" if s["quick"] else "")
        self.page = chart.Page(title, refresh=20 if results["missing"] else 0)
        self.opening()
        self.in_short()
        self.pictures()
        self.clip_t()
        self.presence()
        self.likeness()
        self.steps()
        self.costs()
        self.paired()
        self.fused()
        self.limits()

    def by_size(self, method: str, question: str = "all") -> list[dict | None]:
        return [find(self.summary, method, n, question) for n in self.sizes]

    def tile(self, cell: dict | None, question: str) -> list[Path]:
        """The first four pictures of a cell and prompt."""
        images = cell["images"] if cell else []
        return [self.out / image["file"] for image in images if image["question"] == question][:4]

    def opening(self) -> None:
        s, page, missing = self.settings, self.page, self.results["missing"]
        if missing:
            done = len(self.results["cells"])
            names = ", ".join(missing)
            page.text(f"UNFINISHED: {done} of {done + len(missing)} cells are done. Missing: {names}.")
        if s["quick"]:
            page.text("""A QUICK LOOK, not a result: --quick draws few pictures, with half the sampling steps.
                Run without it before you believe anything here.""")
        drawing = s["drawing"]
        page.text(f"""Model `{s["model"]}`, photos: {s["data"]}; {s["n"]} pictures for each cell and prompt,
            drawn by {drawing["sampler"]} in {drawing["steps"]} steps with guidance {drawing["cfg"]:g} at
            {drawing["size"]} px, from the same noise for every method and size. Scored by CLIP
            `{s["scorer"]}`. {budget(self.results)}""")
        page.text(certainty(s))

    def in_short(self) -> None:
        page = self.page
        page.heading("In short")
        found = [
            (name, r) for name, m in zip(self.names, self.methods) if (r := find(self.summary, m, self.at))
        ]
        if found:
            found.sort(key=lambda x: -x[1]["both"][0])
            shares = "; ".join(f"{name} {percent(r['both'])}" for name, r in found)
            page.text(f"""Asked for the subject and for {self.settings["context"]} after {self.at} photos, the
                share of pictures that are recognised both as "{self.kind}" and as "{self.condition}":
                {shares}.""")
        untouched = [r for r in all_prompts(self.summary) if r["method"] == "untouched"]
        if untouched:
            shares = "; ".join(f'"{r["ask"]}" {percent(r["both"])}' for r in untouched)
            page.text(f"The untouched model, asked in these words: {shares}.")
        rows = [[NAMES[m], *(percent(r and r["both"]) for r in self.by_size(m))] for m in self.methods]
        page.table(["both at once, all prompts", *self.size_names], rows)
        captions = f"recognised as {self.kind}", f"recognised as {self.condition}", "both at once"
        for share, caption in zip(SHARES, captions if found else ()):
            values = [[r and r[share] for r in self.by_size(m)] for m in self.methods]
            sizes = [str(n) for n in self.sizes]
            svg = chart.bars(sizes, self.names, values, "photos to learn from", "share of pictures")
            caption = f"Share of pictures {caption}, all prompts together, with 95 % intervals."
            page.chart(svg, self.out / "charts" / f"{share}.svg", caption)

    def pictures(self) -> None:
        """The paper's figures: photos down, methods across; then the untouched model."""
        page, grids = self.page, self.out / "grids"
        cells = {(c["method"], c["photos"]): c for c in self.first_seed}
        page.heading("Pictures")
        page.text("The first four of each cell, not chosen. The same place shows the same noise.")
        for q in self.settings["questions"]:
            tiles = [[self.tile(cells.get((m, n)), q["key"]) for m in self.methods] for n in self.sizes]
            if not q["literal_tokens"] and any(tile for row in tiles for tile in row):
                image = chart.sheet(tiles, self.size_names, self.names)
                caption = f'Prompt {q["key"]}: "{q["prompt"]}". Photos down, methods across.'
                page.picture(image, grids / f"{q['key']}.png", caption)
        if self.untouched:
            tiles = [[self.tile(c, k) for k in self.keys] for c in self.untouched]
            columns = [f"Prompt {k}" for k in self.keys]
            image = chart.sheet(tiles, [c["ask"] for c in self.untouched], columns)
            caption = "The untouched model, asked in the words at the left."
            page.picture(image, grids / "untouched.png", caption)

    def clip_t(self) -> None:
        page = self.page
        page.heading("CLIP-T")
        page.text(f"""Cosine of picture and text, CLIP `{self.settings["scorer"]}`, nothing put before the
            text. (images.csv and results.json have it as CLIPScore too, 2.5 max(cos, 0) with "A photo depicts
            " before the text; torchmetrics prints 100 max(cos, 0).) Three texts are scored: the prompt as
            asked, whose pseudo word means nothing to this CLIP; with the subject's words in its place; and
            the context alone, which any burning house satisfies.""")
        for q in (q for q in self.settings["questions"] if q["key"] in self.keys):
            texts = "; ".join(f'{label}: "{q["texts"][t]}"' for t, label in TEXTS.items())
            page.text(f"Prompt {q['key']}. Scored {texts}.")
            rows = []
            for m in self.methods:
                found = self.by_size(m, q["key"])
                for t, label in TEXTS.items():
                    rows.append([NAMES[m], label, *(decimal(r and r[f"cosine_{t}"]) for r in found)])
            page.table(["method", "text scored", *self.size_names], rows)
        rows = [
            [f'"{r["ask"]}"', r["question"], *(decimal(r[f"cosine_{t}"]) for t in TEXTS)]
            for r in self.summary["rows"]
            if r["method"] == "untouched" and r["question"] in self.keys
        ]
        page.text("The untouched model against the same texts:")
        page.table(["asked for", "prompt", *TEXTS.values()], rows)

    def presence(self) -> None:
        page, s = self.page, self.settings
        kinds, conditions = (
            ", ".join(f'"{text}"' for text in s[c].values()) for c in ("kinds", "conditions")
        )
        page.heading("Is it there?")
        page.text(f"""Recognised as X: of these texts, X fits the picture best. Kinds: {kinds}. Conditions:
            {conditions}. Both at once is what the application needs.""")
        rows = [
            [*model_and_photos(r), r["question"], r["pictures"], *(percent(r[k]) for k in SHARES)]
            for r in self.summary["rows"]
            if r["question"] in ("all", "word", *self.keys)
        ]
        columns = ["model", "photos", "prompt", "pictures", self.kind, self.condition, "both"]
        page.table(columns, rows)
        page.heading("What else it is taken for")
        of_all = all_prompts(self.summary)
        kinds = [k for k in s["kinds"] if any(r["kinds"].get(k, 0) >= 0.005 for r in of_all)]
        page.text("All prompts together. A kind that is nowhere half a percent has no column.")
        rows = [
            [*model_and_photos(r), *(f"{100 * r['kinds'].get(k, 0):.0f} %" for k in kinds)] for r in of_all
        ]
        page.table(["model", "photos", *kinds], rows)

    def likeness(self) -> None:
        page, checks = self.page, self.checks
        levels = ", ".join(f"{v:.3f} at {n} photos" for n, v in checks["nearest_95"].items())
        page.heading("Likeness, copies, variety")
        page.text(f"""Likeness (CLIP-I): mean cosine with {checks["held_out"]} held-out photos that no method
            has seen. Ceiling, held-out against held-out: {decimal(checks["ceiling"])}. Floor: the untouched
            model below. The pseudo word alone (prompt `word`) is the fair test: no photo shows fire, so fire
            lowers it.""")
        page.text(f"""Nearest photo: cosine with the most similar training photo. A copy is suspected above
            the level that 95 % of the held-out photos stay below ({levels}); so 5 % above it is no sign of
            copying. The closest training and held-out photo have cosine {checks["closest_pair"]:.3f}.
            Variety: mean of 1 - cosine between the pictures of one cell and prompt; 0 would be one picture
            over and over.""")
        rows = []
        for r in self.summary["rows"]:
            if r["question"] in ("word", "all"):
                scores = [decimal(r["likeness"]), decimal(r["nearest"]), percent(r.get("copies"))]
                variety = "" if r["diversity"] is None else f"{r['diversity']:.3f}"
                rows.append([*model_and_photos(r), r["question"], *scores, variety])
        columns = ["likeness", "nearest photo", "above the level", "variety"]
        page.table(["model", "photos", "prompt", *columns], rows)

    def steps(self) -> None:
        """How many steps for how many photos."""
        page, curves = self.page, self.summary["learning"]
        if not curves:
            return
        page.heading("How many steps?")
        page.text(f"""Loss of the {self.checks["held_out"]} held-out photos along the training, at timesteps
            and noise that stay the same, unweighted. It falls while a model learns what all photos of the
            subject share and rises again when it overfits its own photos; the ring is the lowest point. It is
            a loss, not a picture: where it is lowest, a subject may not be recognised yet. The start is the
            untouched model with the word (for Textual Inversion, the words that it starts from).""")
        for m in self.methods:
            if chosen := [row for row in curves if row["method"] == m]:
                series = [f"{row['photos']} photos" for row in chosen]
                points = [row["curve"] for row in chosen]
                svg = chart.lines(series, points, f"step of {NAMES[m]}", "held-out loss")
                caption = f"{NAMES[m]}: loss of the held-out photos."
                page.chart(svg, self.out / "charts" / f"held-out-{m}.svg", caption)
        rows = []
        for r in curves:
            (_, start), (last_step, end), (step, lowest) = r["curve"][0], r["curve"][-1], r["best"]
            numbers = [f"{start:.4f}", f"{lowest:.4f}", f"{step} of {last_step}", f"{end:.4f}"]
            rows.append([NAMES[r["method"]], r["photos"], *numbers])
        page.table(["method", "photos", "at the start", "lowest", "at step", "at the end"], rows)

    def costs(self) -> None:
        page = self.page
        machines = sorted({c["times"]["machine"] or "an unknown machine" for c in self.trained})
        page.heading("What it costs")
        page.text(f"""Seconds on {"; ".join(machines) or "no machine yet"}. Every training is a process of its
            own train_X.py. Wall is the whole process: class pictures (DreamBooth's), the training loop, and
            the rest (start, encoding the photos, the loss of the held-out ones, saving). Peak is the most
            memory that the process held, and on a GPU what it held there. The captions came with the photos:
            captioning took no time here.""")
        if self.first_seed:
            seconds = [[c["times"][k] for k in COSTS] for c in self.first_seed]
            parts = ["class pictures", "training", "rest of the process", "sampling"]
            rows = [f"{NAMES[c['method']]}, {c['photos']}" for c in self.first_seed]
            svg = chart.stacked(rows, parts, seconds, "seconds", "method, photos")
            page.chart(svg, self.out / "charts" / "time.svg", "Time by cell, first training seed.")
        rows = []
        for c in self.trained:
            t = c["times"]
            seconds = [f"{t[k]:.1f}" for k in ("wall", *COSTS)]
            rate = f"{t['steps_per_second']:.1f}" if t["steps_per_second"] else ""
            peaks = [(t["peak_bytes"], ""), (t["gpu_bytes"], " GPU")]
            peak = ", ".join(f"{b / 2**20:.0f} MiB{where}" for b, where in peaks if b) or "unknown"
            size = f"{t['file_bytes'] / 2**20:.2f} MiB"
            about = [NAMES[c["method"]], c["photos"], c["seed"], c["steps"]]
            rows.append([*about, *seconds, t["pictures"], rate, peak, size])
        columns = "method photos seed steps wall class training rest sampling pictures steps/s peak file"
        page.table(columns.split(), rows)

    def paired(self) -> None:
        pairs = self.summary["pairs"]
        if not pairs:
            return
        self.page.heading(f"Differences between methods at {self.at} photos")
        test = """One training, pictures only: no test is made, because another training of the same two was
            not seen."""
        if tested := "p_holm" in pairs[0]:
            test = f"""p: t-test on one difference per training seed, then Holm's correction over the
                {len(pairs)} pairs; below 0.05 is what one may call a difference."""
        self.page.text(f"""Difference in the share of pictures with both, in percentage points, paired: same
            photos, same order and noise in training, same noise in drawing. {test}""")
        rows = []
        for pair in pairs:
            v, low, high = (x if x is None else 100 * x for x in pair["difference"])
            gap = f"{v:+.0f}" + ("" if low is None else f" [{low:+.0f}, {high:+.0f}]")
            p = [f"{pair['p']:.3f}", f"{pair['p_holm']:.3f}"] if tested else []
            rows.append([NAMES[pair["a"]], NAMES[pair["b"]], gap, *p])
        self.page.table(["method", "minus", "points", *(["p", "p, Holm"] if tested else [])], rows)

    def fused(self) -> None:
        """The prompts whose pseudo word the tokenizer fuses with what follows, both ways."""
        page = self.page
        by_key = {q["key"]: q for q in self.settings["questions"]}
        fused = [q for q in by_key.values() if q["literal_tokens"]]
        cells = {c["method"]: c for c in self.first_seed if c["photos"] == self.at}
        if not fused or not cells:
            return
        page.heading("The prompt whose pseudo word is not in it")
        for literal in fused:
            split = by_key[literal["key"].removesuffix(" literal")]
            whole, cut = (", ".join(f"`{t}`" for t in q["tokens"]) for q in (literal, split))
            page.text(f"""In "{split["prompt"]}" CLIP's tokenizer joins the pseudo word to the sign behind it
                and reads {whole}: another entry of the vocabulary than the word that was trained. All results
                above split it off first: {cut}. Below, the same models and the same noise, read both
                ways.""")
            tiles = [[self.tile(c, q["key"]) for c in cells.values()] for q in (split, literal)]
            image = chart.sheet(tiles, ["word cut out", "left in"], [NAMES[m] for m in cells])
            key = split["key"]
            caption = f"Prompt {key} with {self.at} photos: pseudo word split off, and left to the tokenizer."
            page.picture(image, self.out / "grids" / f"{key}-both-ways.png", caption)
            rows = []
            for m in cells:
                two = [find(self.summary, m, self.at, q["key"]) for q in (split, literal)]
                rows.append([NAMES[m], *(percent(r[k]) for k in SHARES for r in two)])
            shares, readings = (self.kind, self.condition, "both"), ("cut out", "left in")
            page.table(["method", *(f"{share}, {how}" for share in shares for how in readings)], rows)
        page.text("""What this means for the paper that is repeated here: its prompt A is written in just this
            way, and the usual tools look the pseudo word up by its entry. If its pictures were drawn with
            such a tool, those for prompt A were asked for without the word that had been taught, and its
            Figure 3 shows how four models answer to a sign and "fire". That is our inference from the
            vocabulary; we do not know how they were drawn, and a space before the comma would have been
            enough to avoid it. The two rows above let the reader judge how much it matters.""")

    def limits(self) -> None:
        page, checks = self.page, self.checks
        page.heading("Can the scores be trusted?")
        n, recognised = checks["held_out"], "held-out photos recognised as"
        rows = [
            [f'{recognised} "{self.kind}"', f"{checks['recognised']} of {n}", "all"],
            [f'{recognised} "{self.condition}"', f"{checks['called_wanted']} of {n}", "what they show"],
        ]
        if checks["own_caption"] is not None:
            fits = "a photo's own caption fits it better than another photo's"
            shuffled = "the same with the captions shuffled"
            rows.append([fits, f"{100 * checks['own_caption']:.0f} %", "near 100 %"])
            rows.append([shuffled, f"{100 * checks['shuffled_caption']:.0f} %", "near 50 %, chance"])
        page.table(["checked on photos that nothing was trained on", "found", "wanted"], rows)
        page.heading("What is not known")
        page.text("CLIP is blind to quality, and it reads a text as a bag of words.")
        if len(self.settings["seeds"]) == 1:
            page.text("""How much another training would differ: there was one per cell. `--seeds 0 1 2 3 4`
                tells.""")
        page.text(
            "What each method could do with other settings: its own were chosen beforehand, on other prompts."
        )
        page.text(
            "Whether the order of the methods holds for another subject, another model or another budget."
        )
        if self.settings["model"] == "tiny":
            page.text("""What the drawn world says about photographs: small enough to repeat everything, it
                proves nothing.""")
