"""What a comparison has shown, as report.html, report.md, results.json and images.csv.

`write(out, results)` is all that the command calls; `results` is its manifest with the finished cells.
Read next: hanokdiff/compare/summary.py (the numbers), hanokdiff/compare/sections.py (the page).
"""

import csv
import io
import json
from pathlib import Path

from hanokdiff.compare.sections import NAMES, all_prompts, certainty, compose, decimal, first, percent
from hanokdiff.compare.summary import SHARES, summarise
from hanokdiff.files import write_text


def write(out: Path, results: dict) -> str:
    """The four files, whole or not at all. Returns a table for the terminal."""
    summary = summarise(results)
    page = compose(out, results, summary)
    cells = [{k: v for k, v in cell.items() if k != "images"} for cell in results["cells"]]
    content = {**results, "cells": cells, "summary": summary}
    files = {
        "results.json": json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "images.csv": as_csv([image for cell in results["cells"] for image in cell["images"]]),
        "report.md": page.markdown(),
        "report.html": page.html(),
    }
    for name, text in files.items():
        write_text(out / name, text, newline="")
    return terminal(results, summary)


def as_csv(rows: list[dict]) -> str:
    text = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def terminal(results: dict, summary: dict) -> str:
    s = results["settings"]
    lines = [["", "photos", first(s["kinds"]), first(s["conditions"]), "both", "CLIP-T (words)"]]
    for r in all_prompts(summary):
        name = f'untouched: "{r["ask"]}"' if r["method"] == "untouched" else NAMES[r["method"]]
        shares = [percent(r[k]) for k in SHARES]
        lines.append([name, str(r["photos"] or ""), *shares, decimal(r["cosine_words"])])
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return f"\n{table}\n{certainty(s)}"
