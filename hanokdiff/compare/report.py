"""What a comparison has shown, as report.html, report.md, results.json and images.csv.

`write(out, results)` is all that the command calls; `results` is its manifest with the finished cells.
Read next: hanokdiff/compare/summary.py (the numbers), sections.py and appendix.py (the page).
"""

import csv
import io
import json
from pathlib import Path

from hanokdiff import chart
from hanokdiff.compare.appendix import Appendix
from hanokdiff.compare.sections import Answers, certainty, decimal, first, name_of, percent
from hanokdiff.compare.summary import SHARES, summarise
from hanokdiff.files import write_text


def write(out: Path, results: dict, images: list[dict]) -> str:
    """The four files, whole or not at all. Returns a table for the terminal."""
    summary = summarise(results)
    page = compose(out, results, summary, images)
    files = {
        "results.json": json.dumps(
            {**results, "summary": summary}, indent=1, ensure_ascii=False, allow_nan=False
        )
        + "\n",
        "images.csv": as_csv(images),
        "report.md": page.markdown(),
        "report.html": page.html(),
    }
    for name, text in files.items():
        write_text(out / name, text, newline="")
    return terminal(results, summary)


def compose(out: Path, results: dict, summary: dict, images: list[dict]) -> chart.Page:
    """The page, from top to bottom."""
    answers, appendix = (part(out, results, summary, images) for part in (Answers, Appendix))
    appendix.page = answers.page
    answers.write()
    appendix.write()
    return answers.page


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
    for r in (r for r in summary["rows"] if r["question"] == "all"):
        shares = [percent(r[k]) for k in SHARES]
        lines.append([name_of(r), str(r["photos"] or ""), *shares, decimal(r["cosine_words"])])
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return f"\n{table}\n{certainty(s)}"
