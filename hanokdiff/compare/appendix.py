"""The page of a comparison, second part: scores, likeness, steps, costs, and what the numbers cannot say.

Read next: hanokdiff/chart.py (what a page is made of).
"""

from hanokdiff import chart
from hanokdiff.compare.sections import SHARES, View, decimal, name_of, percent
from hanokdiff.compare.summary import TEXTS, find

COSTS = ("class", "training", "other", "sampling")  # seconds of


class Appendix(View):
    """Each section is a method that adds its blocks to the page."""

    def write(self) -> None:
        self.clip_t()
        self.likeness()
        self.steps()
        self.costs()
        self.fused()
        self.limits()

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
            for m in self.recipes:
                found = self.by_size(m, q["key"])
                for t, label in TEXTS.items():
                    rows.append([m, label, *(decimal(r and r[f"cosine_{t}"]) for r in found)])
            page.table(["recipe", "text scored", *self.size_names], rows)
        page.text("All prompts together, the averages that the paper of 2023 prints in its Tables 2 to 4:")
        rows = [
            [name_of(r), r["photos"] or "", *(decimal(r[f"cosine_{t}"]) for t in TEXTS)]
            for r in self.rows("all")
        ]
        page.table(["recipe", "photos", *TEXTS.values()], rows)

    def likeness(self) -> None:
        page, checks = self.page, self.checks
        levels = ", ".join(f"{v:.3f} at {n} photos" for n, v in checks["copy_levels"].items())
        page.heading("Likeness, copies, variety")
        page.text(f"""Likeness (CLIP-I): mean cosine with {checks["held_out"]} held-out photos that no method
            has seen. Ceiling, held-out against held-out: {decimal(checks["ceiling"])}. Floor: the untouched
            model below. The pseudo word alone (prompt `word`) is the fair test: no photo shows fire, so fire
            lowers it.""")
        page.text(f"""Nearest photo: cosine with the most similar training photo. A copy is suspected
            above the level that 95 % of the held-out photos stay below (of the first set: {levels}); so
            5 % above it is no sign of copying. The closest training and held-out photo have cosine
            {checks["closest_pair"]:.3f}. Variety: mean of 1 - cosine between the pictures of one cell
            and prompt; 0 would be one picture over and over.""")
        rows = []
        for r in self.rows("word", "all"):
            scores = [decimal(r["likeness"]), decimal(r["nearest"]), percent(r["copy"])]
            variety = "" if r["diversity"] is None else f"{r['diversity']:.3f}"
            rows.append([name_of(r), r["photos"] or "", r["question"], *scores, variety])
        columns = ["likeness", "nearest photo", "above the level", "variety"]
        page.table(["recipe", "photos", "prompt", *columns], rows)

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
        for k, m in enumerate(self.recipes):
            if chosen := [row for row in curves if row["recipe"] == m]:
                series = [f"{row['photos']} photos" for row in chosen]
                points = [row["curve"] for row in chosen]
                svg = chart.lines(series, points, f"step of {m}", "held-out loss")
                caption = f"{m}: loss of the held-out photos."
                page.chart(svg, self.out / "charts" / f"held-out-{k + 1}.svg", caption)
        rows = []
        for r in curves:
            (_, start), (last_step, end), (step, lowest) = r["curve"][0], r["curve"][-1], r["best"]
            numbers = [f"{start:.4f}", f"{lowest:.4f}", f"{step} of {last_step}", f"{end:.4f}"]
            rows.append([r["recipe"], r["photos"], *numbers])
        page.table(["recipe", "photos", "at the start", "lowest", "at step", "at the end"], rows)

    def costs(self) -> None:
        page = self.page
        machines = sorted({c["times"]["machine"] or "an unknown machine" for c in self.trained})
        page.heading("What it costs")
        threads = sorted({c["times"]["threads"] for c in self.trained if c["times"]["threads"]})
        used = ", ".join(map(str, threads)) or "an unknown number of"
        page.text(f"""Seconds on {"; ".join(machines) or "no machine yet"}; every training is a process
            of its own train_X.py with {used} thread{"s" * (threads != [1])}, beside others if there are
            more cores. Wall is the whole process: class pictures, the training loop, and the rest
            (start, encoding the photos, the loss of the held-out ones, saving). Peak is the most memory
            that the process held, and on a GPU what it held there. The captions came with the photos:
            captioning took no time here. Means over sets.""")
        rows, bars = [], {}
        for m in self.recipes:
            for n in self.sizes:
                times = [c["times"] for c in self.trained if (c["recipe"], c["photos"]) == (m, n)]
                if not times:
                    continue
                mean = {
                    k: sum(t[k] or 0 for t in times) / len(times)
                    for k in ("wall", *COSTS, "pictures", "steps_per_second")
                }
                bars[f"{m}, {n}"] = [mean[k] for k in COSTS]
                most = {k: max(t[k] or 0 for t in times) for k in ("peak_bytes", "gpu_bytes", "file_bytes")}
                peaks = [(most["peak_bytes"], ""), (most["gpu_bytes"], " GPU")]
                peak = ", ".join(f"{b / 2**20:.0f} MiB{where}" for b, where in peaks if b) or "unknown"
                steps = next(c["steps"] for c in self.trained if (c["recipe"], c["photos"]) == (m, n))
                seconds = [f"{mean[k]:.1f}" for k in ("wall", *COSTS)]
                rate = f"{mean['steps_per_second']:.1f}" if mean["steps_per_second"] else ""
                size = f"{most['file_bytes'] / 2**20:.2f} MiB"
                rows.append([m, n, len(times), steps, *seconds, f"{mean['pictures']:.0f}", rate, peak, size])
        if bars:
            parts = ["class pictures", "training", "rest of the process", "sampling"]
            svg = chart.stacked(list(bars), parts, list(bars.values()), "seconds", "recipe, photos")
            page.chart(svg, self.out / "charts" / "time.svg", "Time by recipe and photos, mean over sets.")
        if len(self.sizes) > 1 and bars:
            chosen = [m for m in self.recipes if len(self.settings["trained_at"][m]) > 1]
            lines = [
                [(n, sum(bars[f"{m}, {n}"][:3])) for n in self.sizes if f"{m}, {n}" in bars] for m in chosen
            ]
            shown = [(m, line) for m, line in zip(chosen, lines, strict=True) if line]
            if shown:
                svg = chart.lines(
                    [m for m, _ in shown], [line for _, line in shown], "photos", "seconds", ring=False
                )
                caption = f"Time of a training against photos, budget: {self.settings['budget']}."
                page.chart(svg, self.out / "charts" / "time-photos.svg", caption)
        columns = "recipe photos trainings steps wall class training rest sampling pictures steps/s peak file"
        page.table(columns.split(), rows)

    def fused(self) -> None:
        """The prompts whose pseudo word the tokenizer fuses with what follows, both ways."""
        page = self.page
        by_key = {q["key"]: q for q in self.settings["questions"]}
        fused = [q for q in by_key.values() if q["literal_tokens"]]
        cells = {c["recipe"]: c for c in self.first_set if c["photos"] == self.at}
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
            key = split["key"]
            if any(tile for row in tiles for tile in row):
                image = chart.sheet(tiles, ["word cut out", "left in"], list(cells))
                caption = (
                    f"Prompt {key} with {self.at} photos: pseudo word split off, and left to the tokenizer."
                )
                page.picture(image, self.out / "grids" / f"{key}-both-ways.png", caption)
            rows = []
            for m in cells:
                two = [find(self.summary, m, self.at, q["key"]) for q in (split, literal)]
                rows.append([m, *(percent(r[k]) for k in SHARES for r in two)])
            shares, readings = (self.kind, self.condition, "both"), ("cut out", "left in")
            page.table(["recipe", *(f"{share}, {how}" for share in shares for how in readings)], rows)
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
            page.text("""How much another training would differ: there was one per cell. `--seeds 1 2 3 4
                5 6 7 8` tells.""")
        page.text(
            "What each recipe could do with other settings: its own were chosen beforehand, on other prompts."
        )
        page.text(
            "Whether the order of the recipes holds for another subject, another model or another budget."
        )
        if self.settings["model"] == "tiny":
            page.text("""What the drawn world says about photographs: small enough to repeat everything, it
                proves nothing.""")
