"""A run's own page, RUN/index.html: what it learns from, how far it is, what it draws. Written anew along the
way; one file that needs nothing else, for a desk or a phone.

And log.csv, the log for those who plot it themselves.
"""

import csv
import io
import json
from pathlib import Path

from PIL import Image

from hanokdiff import chart
from hanokdiff.errors import notes
from hanokdiff.files import read_json, write_text
from hanokdiff.images import labelled_sheet
from hanokdiff.training.dataset import SHOWN

DRAW = {  # artefact -> the option of sample.py, and what convert makes of it
    "lora.safetensors": ("--lora {file}", "{stem}-diffusers.safetensors"),
    "embedding.safetensors": ("--embedding {file}", "{stem}.pt"),
    "hypernet.pt": ("--hypernet {file}", None),
    "model": ("--model {file}", "model.safetensors"),
}
LINES = {  # column of the log -> the chart that it is in
    "loss": "loss", "held_out": "loss", "lr": "learning rate", "grad_norm": "gradient norm",
    "ratio": "|f(x)| / |x|", "norm": "norm of the vectors, against a word's",
}  # fmt: skip


def read_log(out: Path) -> list[dict]:
    rows = []
    for line in (out / "log.jsonl").read_text("utf-8", "replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off by a kill
            continue
    return rows


def write(out: Path, artefact: str, photos: Image.Image | None, captions: list[str]) -> None:
    """index.html and log.csv. photos: a sheet of what is trained on, as it is used; captions: of all."""
    rows, config = read_log(out), read_json(out / "config.json")
    write_text(out / "log.csv", as_csv(rows), newline="")
    step = max((r["step"] for r in rows), default=0)
    done = (out / artefact).exists()
    page = chart.Page(f"{config.get('method', 'a run')}: {out.name}", refresh=0 if done else 20)
    seconds = max((r.get("seconds", 0) for r in rows), default=0)
    state = "Finished" if done else "Under way"
    page.text(f"{state}: step {step} of {config['steps']}, {seconds:.0f} s of training.")
    for note in dict.fromkeys(notes):
        page.text(f"Note: {note}")
    page.heading("What it draws")
    previews = sorted((out / "previews").glob("[0-9]*.png"))
    for file in previews:
        with Image.open(file) as image:
            page.embed(image.convert("RGB"), f"step {int(file.stem)}")
    if not previews:
        page.text("No preview yet: `--preview-every` says how often there is one.")
    curves(page, rows)
    page.heading("What it learns from")
    if photos:
        page.embed(photos, f"The photos as they are used, {len(captions)} in all; the first {SHOWN} at most.")
    page.table(["caption"], [[text] for text in dict.fromkeys(captions[:SHOWN])])
    if done:
        commands(page, out, artefact, config)
    page.heading("Settings")
    plain = {k: v for k, v in config.items() if not isinstance(v, list | dict) or len(v) < 6}
    page.table(["option", "value"], [[k, "" if v is None else v] for k, v in plain.items()])
    write_text(out / "index.html", page.html())


def curves(page: chart.Page, rows: list[dict]) -> None:
    """Each chart with the columns that belong together."""
    page.heading("The curves")
    for title in dict.fromkeys(LINES.values()):
        names = [k for k, chart_ in LINES.items() if chart_ == title]
        points = {k: [(r["step"], r[k]) for r in rows if isinstance(r.get(k), int | float)] for k in names}
        points = {k: line for k, line in points.items() if len(line) > 1}
        if points:
            series = [k.replace("_", " ") for k in points]
            page.svg(
                chart.lines(series, list(points.values()), "step", title, ring="held_out" in points), title
            )


def commands(page: chart.Page, out: Path, artefact: str, config: dict) -> None:
    page.heading("What to do with it")
    option, other = DRAW[artefact]
    option, word, file = option.format(file=out / artefact), config["token"], out / artefact
    base = [] if artefact == "model" or config["model"] == "tiny" else ["--model", config["model"]]
    draw = " ".join(
        ["python sample.py", f'"{word}, fire"', f'"{word} at night"', option, *base, "--n 8 --grid"]
    )
    page.code(f"{draw} --out runs/{out.name}-pictures")
    page.code(f'python clipscore.py runs/{out.name}-pictures --replace-token "{word}" "a hanok"')
    if other:
        page.code(f"python -m hanokdiff.convert {file} {out / other.format(stem=Path(artefact).stem)}")


def sheet(images: list[Image.Image], columns: int = 8) -> Image.Image:
    """The photos side by side."""
    rows = [images[k : k + columns] for k in range(0, len(images), columns)]
    rows[-1] += [None] * (min(columns, len(images)) - len(rows[-1]))
    return labelled_sheet(rows, [""] * len(rows), [""] * len(rows[0]))


def as_csv(rows: list[dict]) -> str:
    """One line a step, what was logged at the same step beside each other."""
    by_step: dict[int, dict] = {}
    for row in rows:
        by_step.setdefault(row["step"], {}).update(row)
    text, names = io.StringIO(newline=""), list(dict.fromkeys(k for row in by_step.values() for k in row))
    if names:
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(by_step.values())
    return text.getvalue()
