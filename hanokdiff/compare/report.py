"""What a comparison has shown, as report.html, report.md, results.json and images.csv.

`write(out, results)` is all that hanokdiff/compare/__main__.py calls; `results` is its manifest with the finished
cells.
Read next: hanokdiff/compare/summary.py (where the numbers come from), hanokdiff/compare/chart.py (how the page is
made).
"""

import csv
import io
import json
from pathlib import Path

from hanokdiff.compare import chart
from hanokdiff.compare.summary import SHARES, TEXTS, find, paper, summarise
from hanokdiff.files import write_text

NAMES = {
    "ti": "Textual Inversion",
    "dreambooth": "DreamBooth",
    "lora": "LoRA",
    "hypernet": "Hypernetwork",
    "untouched": "untouched model",
}


# ---------------------------------------------------------------------------------------------------------- words


def share(v: list | None) -> str:
    """12 % [7, 20]"""
    if not v or v[1] is None:
        return "" if not v else f"{100 * v[0]:.0f} %"
    return f"{100 * v[0]:.0f} % [{max(0, 100 * v[1]):.0f}, {min(100, 100 * v[2]):.0f}]"


def mean(v: list | None, digits: int = 3) -> str:
    if v is None or v[1] is None:
        return "" if v is None else f"{v[0]:.{digits}f}"
    return f"{v[0]:.{digits}f} [{v[1]:.{digits}f}, {v[2]:.{digits}f}]"


def certainty(settings: dict) -> str:
    n = len(settings["seeds"])
    if n > 1:
        return f"Intervals: 95 %, Student's t over {n} trainings with seeds {', '.join(map(str, settings['seeds']))}."
    return (
        "Intervals: 95 %, one training, pictures only. They say how far other pictures of the same training would "
        "differ; another training may differ by more."
    )


def write(out: Path, results: dict) -> str:
    """The four files, whole or not at all. Returns a table for the terminal."""
    summary = summarise(results)
    page = compose(out, results, summary)
    rows = [row for cell in results["cells"] for row in cell["images"]]
    kept = [{k: v for k, v in cell.items() if k != "images"} for cell in results["cells"]]
    held = io.StringIO(newline="")
    if rows:
        table = csv.DictWriter(held, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    content = json.dumps(
        {**results, "cells": kept, "summary": summary}, indent=1, ensure_ascii=False, allow_nan=False
    )
    for name, text in (
        ("results.json", content + "\n"),
        ("images.csv", held.getvalue()),
        ("report.md", page.markdown()),
        ("report.html", page.html()),
    ):
        write_text(out / name, text, newline="")
    return terminal(results, summary)


def terminal(results: dict, summary: dict) -> str:
    s = results["settings"]
    kind, condition = next(iter(s["kinds"])), next(iter(s["conditions"]))
    lines = [["", "photos", kind, condition, "both", "CLIP-T (words)"]]
    for r in summary["rows"]:
        if r["question"] == "all":
            name = f'untouched: "{r["ask"]}"' if r["method"] == "untouched" else NAMES[r["method"]]
            lines.append(
                [name, str(r["photos"] or ""), *(share(r[k]) for k in SHARES), mean(r["cosine_words"])]
            )
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return f"\n{table}\n{certainty(s)}"


# ----------------------------------------------------------------------------------------------------------- page


def compose(out: Path, results: dict, summary: dict) -> chart.Page:
    s = results["settings"]
    quick = ", a quick look" if s["quick"] else ""
    page = chart.Page(
        f"Four ways to teach a model one subject{quick}", refresh=20 if results["missing"] else 0
    )
    opening(page, out, results, summary)
    pictures(page, out, results)
    clip_t(page, results, summary)
    presence(page, s, summary)
    likeness(page, results, summary)
    steps(page, out, results, summary)
    costs(page, out, results)
    paired(page, s, summary)
    fused(page, out, results, summary)
    unknown(page, results)
    return page


def opening(page, out: Path, results: dict, summary: dict) -> None:
    s, at = results["settings"], summary["pairs_at"]
    kind, condition, missing = next(iter(s["kinds"])), next(iter(s["conditions"])), results["missing"]
    if missing:
        total = len(missing) + len(results["cells"])
        page.say(
            f"UNFINISHED: {total - len(missing)} of {total} cells are done. Missing: {', '.join(missing)}."
        )
    if s["quick"]:
        page.say("""A QUICK LOOK, not a result: --quick draws few pictures, with half the sampling steps. Run without it
            before you believe anything here.""")
    drawing = s["drawing"]
    page.say(f"""Model `{s["model"]}`, photos: {s["data"]}; {s["n"]} pictures for each cell and prompt, drawn by
        {drawing["sampler"]} in {drawing["steps"]} steps with guidance {drawing["cfg"]:g} at {drawing["size"]} px,
        from the same noise for every method and size. Judge: CLIP `{s["scorer"]}`. {budget(results)}""")
    page.say(certainty(s))
    page.head("In short")
    found = [(m, r) for m in s["methods"] if (r := find(summary, m, at))]
    if found:
        found.sort(key=lambda x: -x[1]["both"][0])
        told = "; ".join(f"{NAMES[m]} {share(r['both'])}" for m, r in found)
        page.say(f"""Asked for the subject and for {s["context"]} after {at} photos, the share of pictures that are
            recognised both as "{kind}" and as "{condition}": {told}.""")
    asked = [r for r in summary["rows"] if r["method"] == "untouched" and r["question"] == "all"]
    if asked:
        told = "; ".join(f'"{r["ask"]}" {share(r["both"])}' for r in asked)
        page.say(f"The untouched model, asked in these words: {told}.")
    sizes, names = sorted(s["sizes"]), [NAMES[m] for m in s["methods"]]
    rows = [
        [NAMES[m], *(share(r and r["both"]) for r in (find(summary, m, n) for n in sizes))]
        for m in s["methods"]
    ]
    page.table(["both at once, all prompts", *(f"{n} photos" for n in sizes)], rows)
    for name, what in zip(SHARES, (f"recognised as {kind}", f"recognised as {condition}", "both at once")):
        drawn = [[(r := find(summary, m, n)) and r[name] for n in sizes] for m in s["methods"]]
        if found:
            svg = chart.bars(
                [str(n) for n in sizes], names, drawn, "photos to learn from", "share of pictures"
            )
            page.chart(
                svg,
                out / "charts" / f"{name}.svg",
                f"Share of pictures {what}, all prompts together, with 95 % intervals.",
            )


def budget(results: dict) -> str:
    s, steps = results["settings"], {}
    for c in results["cells"]:
        if c["method"] != "untouched":
            steps.setdefault(NAMES[c["method"]], {})[c["photos"]] = c["steps"]
    rule = "the same optimiser steps for every number of photos, but each method its own"
    if s["budget"] == "epochs":
        rule = f"the same passes over the photos for every number of them, as the steps make over {s['epochs_at']}"
    told = []
    for name, of in steps.items():
        each = ", ".join(f"{k} for {n} photos" for n, k in of.items())
        told.append(f"{name} {each if len(set(of.values())) > 1 else next(iter(of.values()))}")
    return f"Budget: {rule}. Steps: {'; '.join(told) or 'none yet'}."


def pictures(page, out: Path, results: dict) -> None:
    """The paper's figures: photos down, methods across; then the untouched model."""
    s, sizes = results["settings"], sorted(results["settings"]["sizes"])
    cells = {(c["method"], c["photos"]): c for c in results["cells"] if c["seed"] == s["seeds"][0]}

    def tile(cell, question):
        return [out / r["file"] for r in cell["images"] if r["question"] == question][:4] if cell else []

    page.head("Pictures")
    page.say("The first four of each cell, not chosen. The same place shows the same noise.")
    for q in (q for q in s["questions"] if not q["literal_tokens"]):
        tiles = [[tile(cells.get((m, n)), q["key"]) for m in s["methods"]] for n in sizes]
        if any(t for row in tiles for t in row):
            image = chart.sheet(tiles, [f"{n} photos" for n in sizes], [NAMES[m] for m in s["methods"]])
            words = f'Prompt {q["key"]}: "{q["prompt"]}". Photos down, methods across.'
            page.picture(image, out / "grids" / f"{q['key']}.png", words)
    untouched = [c for c in results["cells"] if c["method"] == "untouched"]
    if untouched:
        tiles = [[tile(c, k) for k in paper(s)] for c in untouched]
        image = chart.sheet(tiles, [c["ask"] for c in untouched], [f"Prompt {k}" for k in paper(s)])
        page.picture(
            image, out / "grids" / "untouched.png", "The untouched model, asked in the words at the left."
        )


def clip_t(page, results: dict, summary: dict) -> None:
    s, sizes = results["settings"], sorted(results["settings"]["sizes"])
    page.head("CLIP-T")
    page.say(f"""Cosine of picture and text, judge `{s["scorer"]}`, nothing put before the text. (images.csv and
        results.json have it as CLIPScore too, 2.5 max(cos, 0) with "A photo depicts " before the text; torchmetrics
        prints 100 max(cos, 0).) Three texts are scored: the prompt as asked, whose pseudo word means nothing to the
        judge; with the subject's words in its place; and the context alone, which any burning house satisfies.""")
    for q in (q for q in s["questions"] if q["key"] in paper(s)):
        told = "; ".join(f'{label}: "{q["texts"][t]}"' for t, label in TEXTS.items())
        page.say(f"Prompt {q['key']}. Scored {told}.")
        rows = []
        for m in s["methods"]:
            found = [find(summary, m, n, q["key"]) for n in sizes]
            rows += [
                [NAMES[m], label, *(mean(r and r[f"cosine_{t}"]) for r in found)]
                for t, label in TEXTS.items()
            ]
        page.table(["method", "text scored", *(f"{n} photos" for n in sizes)], rows)
    rows = [
        [f'"{r["ask"]}"', r["question"], *(mean(r[f"cosine_{t}"]) for t in TEXTS)]
        for r in summary["rows"]
        if r["method"] == "untouched" and r["question"] in paper(s)
    ]
    page.say("The untouched model against the same texts:")
    page.table(["asked for", "prompt", *TEXTS.values()], rows)


def named(r: dict) -> list:
    return [
        f'untouched, "{r["ask"]}"' if r["method"] == "untouched" else NAMES[r["method"]],
        r["photos"] or "",
    ]


def presence(page, s: dict, summary: dict) -> None:
    kinds, conditions = ([f'"{text}"' for text in s[c].values()] for c in ("kinds", "conditions"))
    page.head("Is it there?")
    page.say(f"""Recognised as X: of these texts, X fits the picture best. Kinds: {", ".join(kinds)}. Conditions:
        {", ".join(conditions)}. Both at once is what the application needs.""")
    rows = [
        [*named(r), r["question"], r["pictures"], *(share(r[k]) for k in SHARES)]
        for r in summary["rows"]
        if r["question"] in ("all", "word", *paper(s))
    ]
    names = [next(iter(s["kinds"])), next(iter(s["conditions"])), "both"]
    page.table(["model", "photos", "prompt", "pictures", *names], rows)
    page.head("What else it is taken for")
    of_all = [r for r in summary["rows"] if r["question"] == "all"]
    seen = [k for k in s["kinds"] if any(r["kinds"].get(k, 0) >= 0.005 for r in of_all)]
    page.say("All prompts together. A kind that is nowhere half a percent has no column.")
    rows = [[*named(r), *(f"{100 * r['kinds'].get(k, 0):.0f} %" for k in seen)] for r in of_all]
    page.table(["model", "photos", *seen], rows)


def likeness(page, results: dict, summary: dict) -> None:
    known = results["references"]
    levels = ", ".join(f"{v:.3f} at {n} photos" for n, v in known["nearest_95"].items())
    page.head("Likeness, copies, variety")
    page.say(
        f"""Likeness (CLIP-I): mean cosine with {known["held_out"]} held-out photos that no method has seen. Ceiling,
        held-out against held-out: {mean(known["ceiling"])}. Floor: the untouched model below. The pseudo word alone
        (prompt `word`) is the fair test: no photo shows fire, so fire lowers it.""",
        f"""Nearest photo: cosine with the most similar training photo. A copy is suspected above the level that 95 %
        of the held-out photos stay below ({levels}); so 5 % above it is no sign of copying. The closest training and
        held-out photo have cosine {known["closest_pair"]:.3f}. Variety: mean of 1 - cosine between the pictures of
        one cell and prompt; 0 would be one picture over and over.""",
    )
    rows = [
        [
            *named(r),
            r["question"],
            mean(r["likeness"]),
            mean(r["nearest"]),
            share(r.get("copies")),
            "" if r["diversity"] is None else f"{r['diversity']:.3f}",
        ]
        for r in summary["rows"]
        if r["question"] in ("word", "all")
    ]
    page.table(["model", "photos", "prompt", "likeness", "nearest photo", "above the level", "variety"], rows)


def steps(page, out: Path, results: dict, summary: dict) -> None:
    """How many steps for how many photos."""
    told, known = summary["learning"], results["references"]
    if not told:
        return
    page.head("How many steps?")
    page.say(f"""Loss of the {known["held_out"]} held-out photos along the training, at timesteps and noise that stay
        the same, unweighted. It falls while a model learns what all photos of the subject share and rises again when it
        goes on to learn its own by heart; the ring is the lowest point. It is a loss, not a picture: where it is
        lowest, a subject may not be recognised yet. The start is the untouched model with the word (for Textual
        Inversion, the words that it starts from).""")
    for m in results["settings"]["methods"]:
        if own := [row for row in told if row["method"] == m]:
            svg = chart.lines(
                [f"{row['photos']} photos" for row in own],
                [row["curve"] for row in own],
                f"step of {NAMES[m]}",
                "held-out loss",
            )
            page.chart(svg, out / "charts" / f"held-out-{m}.svg", f"{NAMES[m]}: loss of the held-out photos.")
    rows = [
        [
            NAMES[r["method"]],
            r["photos"],
            f"{r['curve'][0][1]:.4f}",
            f"{r['best'][1]:.4f}",
            f"{r['best'][0]} of {r['curve'][-1][0]}",
            f"{r['curve'][-1][1]:.4f}",
        ]
        for r in told
    ]
    page.table(["method", "photos", "at the start", "lowest", "at step", "at the end"], rows)


def costs(page, out: Path, results: dict) -> None:
    cells = [c for c in results["cells"] if c["method"] != "untouched"]
    machines = (
        "; ".join(sorted({c["times"]["machine"] or "an unknown machine" for c in cells})) or "no machine yet"
    )
    first = [c for c in cells if c["seed"] == results["settings"]["seeds"][0]]
    page.head("What it costs")
    page.say(f"""Seconds on {machines}. Every training is a process of its own train_X.py. Wall is the whole process:
        class pictures (DreamBooth's), the training loop, and the rest (start, encoding the photos, looks at the
        held-out ones, saving). Peak is the most memory that the process held, and on a GPU what it held there.
        The captions came with the photos: captioning took no time here.""")
    if first:
        split = [[c["times"][k] for k in ("class", "training", "other", "sampling")] for c in first]
        parts = ["class pictures", "training", "rest of the process", "sampling"]
        rows = [f"{NAMES[c['method']]}, {c['photos']}" for c in first]
        svg = chart.stacked(rows, parts, split, "seconds", "method, photos")
        page.chart(svg, out / "charts" / "time.svg", "Time by cell, first training seed.")
    rows = []
    for c in cells:
        t = c["times"]
        seconds = [f"{t[k]:.1f}" for k in ("wall", "class", "training", "other", "sampling")]
        rate = f"{t['steps_per_second']:.1f}" if t["steps_per_second"] else ""
        peaks = [(t["peak_bytes"], ""), (t["gpu_bytes"], " GPU")]
        peak = ", ".join(f"{b / 2**20:.0f} MiB{where}" for b, where in peaks if b) or "unknown"
        rows.append(
            [
                NAMES[c["method"]],
                c["photos"],
                c["seed"],
                c["steps"],
                *seconds,
                t["pictures"],
                rate,
                peak,
                f"{t['file_bytes'] / 2**20:.2f} MiB",
            ]
        )
    page.table(
        [
            "method",
            "photos",
            "seed",
            "steps",
            "wall",
            "class",
            "training",
            "rest",
            "sampling",
            "pictures",
            "steps/s",
            "peak",
            "file",
        ],
        rows,
    )


def paired(page, s: dict, summary: dict) -> None:
    if not summary["pairs"]:
        return
    page.head(f"Differences between methods at {summary['pairs_at']} photos")
    test = """One training, pictures only: no test is made, because another training of the same two was not seen."""
    if tested := "p_holm" in summary["pairs"][0]:
        test = f"""p: t-test on one difference per training seed, then Holm's correction over the
            {len(summary["pairs"])} pairs; below 0.05 is what one may call a difference."""
    page.say(f"""Difference in the share of pictures with both, in percentage points, paired: same photos, same order
        and noise in training, same noise in drawing. {test}""")
    rows = []
    for pair in summary["pairs"]:
        v, low, high = (x if x is None else 100 * x for x in pair["difference"])
        gap = f"{v:+.0f}" + ("" if low is None else f" [{low:+.0f}, {high:+.0f}]")
        p = [f"{pair['p']:.3f}", f"{pair['p_holm']:.3f}"] if tested else []
        rows.append([NAMES[pair["a"]], NAMES[pair["b"]], gap, *p])
    page.table(["method", "minus", "points", *(["p", "p, Holm"] if tested else [])], rows)


def fused(page, out: Path, results: dict, summary: dict) -> None:
    """The prompts whose pseudo word the tokenizer fuses with what follows, both ways."""
    s, at = results["settings"], summary["pairs_at"]
    by_key = {q["key"]: q for q in s["questions"]}
    both = [(by_key[k.removesuffix(" literal")], q) for k, q in by_key.items() if q["literal_tokens"]]
    cells = {c["method"]: c for c in results["cells"] if c["photos"] == at and c["seed"] == s["seeds"][0]}
    if not both or not cells:
        return
    page.head("The prompt whose pseudo word is not in it")
    names = [next(iter(s["kinds"])), next(iter(s["conditions"])), "both"]
    for split, literal in both:
        whole, cut = (", ".join(f"`{t}`" for t in q["tokens"]) for q in (literal, split))
        page.say(f"""In "{split["prompt"]}" CLIP's tokenizer joins the pseudo word to the sign behind it and reads
            {whole}: another entry of the vocabulary than the word that was trained. All results above split it off
            first: {cut}. Below, the same models and the same noise, read both ways.""")
        tiles = [
            [[out / r["file"] for r in c["images"] if r["question"] == q["key"]][:4] for c in cells.values()]
            for q in (split, literal)
        ]
        words = f"Prompt {split['key']} with {at} photos: pseudo word split off, and left to the tokenizer."
        image = chart.sheet(tiles, ["word cut out", "left in"], [NAMES[m] for m in cells])
        page.picture(image, out / "grids" / f"{split['key']}-both-ways.png", words)
        rows = []
        for m in cells:
            two = [find(summary, m, at, q["key"]) for q in (split, literal)]
            rows.append([NAMES[m], *(share(r[k]) for k in SHARES for r in two)])
        page.table(["method", *(f"{n}, {how}" for n in names for how in ("cut out", "left in"))], rows)
    page.say("""What this means for the paper that is repeated here: its prompt A is written in just this way, and
        the usual tools look the pseudo word up by its entry. If its pictures were drawn with such a tool, those for
        prompt A were asked for without the word that had been taught, and its Figure 3 shows how four models answer
        to a sign and "fire". That is our inference from the vocabulary; we do not know how they were drawn, and a
        space before the comma would have been enough to avoid it. The two rows above let the reader judge how much it
        matters.""")


def unknown(page, results: dict) -> None:
    s, known = results["settings"], results["references"]
    page.head("Can the judge be trusted?")
    kind, condition, n = next(iter(s["kinds"])), next(iter(s["conditions"])), known["held_out"]
    rows = [
        [f'held-out photos recognised as "{kind}"', f"{known['recognised']} of {n}", "all"],
        [
            f'held-out photos recognised as "{condition}"',
            f"{known['called_wanted']} of {n}",
            "what they show",
        ],
    ]
    if known["own_caption"] is not None:
        rows += [
            [what, f"{100 * known[k]:.0f} %", want]
            for what, k, want in (
                ("a photo's own caption fits it better than another photo's", "own_caption", "near 100 %"),
                ("the same with the captions shuffled", "shuffled_caption", "near 50 %, chance"),
            )
        ]
    page.table(["checked on photos that nothing was trained on", "found", "wanted"], rows)
    page.head("What is not known")
    page.say("The judge is blind to quality, and it reads a text as a bag of words.")
    if len(s["seeds"]) == 1:
        page.say("How much another training would differ: there was one per cell. `--seeds 0 1 2 3 4` tells.")
    page.say(
        "What each method could do with other settings: its own were chosen beforehand, on other prompts.",
        "Whether the order of the methods holds for another subject, another model or another budget.",
    )
    if s["model"] == "tiny":
        page.say(
            "What the drawn world says about photographs: small enough to repeat everything, it proves nothing."
        )
