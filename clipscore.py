"""Pictures to scores: how well does each picture show what its prompt says?

    cosine      cos(E_picture, E_text) of CLIP's two embeddings
    CLIPScore   2.5 * max(cos, 0) with "A photo depicts " before the text
    100x        100 * max(cos, 0) without it, as torchmetrics prints

(Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning"; CLIP itself, and
"recognised as" = the best fitting of several texts: Radford et al. 2021.)

    python sample.py "a castle in the snow" --n 8 --out runs/castle
    python clipscore.py runs/castle --presence "a castle|a barn|a tent"

prints the scorer, the exact texts it scored (the prompts that sample.py and the WebUI leave in their PNGs),
and for each folder the three means and the share of pictures recognised as each thing, with 95 % intervals.

CLIPScore is blind to quality, reads a bag of words, and has a scale of its own per model: compare only under
one scorer.  A pseudo word means nothing to it: --replace-token "*" "a hanok".

Next to read: hanokdiff/score.py, where it is computed; hanokdiff/compare.py, the experiment that uses it.
"""

import argparse
import csv
import io
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
INTERVAL = "95 %, Student's t for means, Wilson's for shares, pictures only (another training is not in it)"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "paths", nargs="+", metavar="IMAGE_OR_FOLDER", help="folders are reported apart, not recursive"
    )
    g = p.add_argument_group("what is asked")
    g.add_argument("--prompt", metavar="TEXT", help="one text for all (default: the prompt in each PNG)")
    g.add_argument("--replace-token", nargs=2, metavar=("TOKEN", "WORDS"), help='e.g. "*" "a hanok"')
    g.add_argument(
        "--presence", metavar="A|B|...", help="what share of pictures is recognised as A, as B ..."
    )
    g = p.add_argument_group("the scorer")
    g.add_argument(
        "--clip", metavar="FOLDER|HUB_ID", help="default: tiny, for pictures of at most 64 px only"
    )
    g.add_argument(
        "--device", default="cpu", help="cpu, cuda ... (default: %(default)s, the same everywhere)"
    )
    g = p.add_argument_group("output")
    g.add_argument("--per-image", action="store_true", help="print a line for every picture")
    g.add_argument(
        "--json", type=Path, metavar="FILE", help="everything: scorer, formulas, every picture, summary"
    )
    g.add_argument("--csv", type=Path, metavar="FILE", help="a line for every picture")
    return p


# ------------------------------------------------------------------------------------------------ 1. input


def pictures_in(folder: Path) -> list[Path]:
    """Sorted by name; not the contact sheets (grid*.png, sheet*.png), not folders inside."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != ".")
    sheets = [f for f in files if re.match(r"(grid|sheet).*\.png$", f.name, re.IGNORECASE)]
    if sheets:
        print(f"note: {folder}: {len(sheets)} contact sheets skipped ({sheets[0].name})", file=sys.stderr)
    if len(files) == len(sheets):
        raise ValueError(f"{folder} holds no pictures ({' '.join(sorted(SUFFIXES))}); folders inside "
                         "are not searched, so give the one that holds them")  # fmt: skip
    return [f for f in files if f not in sheets]


def collect(paths: list[str]) -> list[dict]:
    """{folder, file} of every picture, none twice. Those given by name are one group."""
    found = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist; give pictures, or folders of them")
        for f in pictures_in(path) if path.is_dir() else [path]:
            found.setdefault(
                f.resolve(), {"folder": str(path) if path.is_dir() else "(files)", "file": str(f)}
            )
    return list(found.values())


def open_image(file: str):
    """The picture upright, all of it read; its `info` holds a PNG's text."""
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def prompt_of(parameters: str) -> str:
    """The prompt in what the WebUI writes: first, before "Negative prompt: ..." and "Steps: 20, ..."."""
    return re.split(r"(?:^|\n)(?:Negative prompt|Steps):", parameters, maxsplit=1)[0].strip()


def read(rows: list[dict], prompt: str | None) -> tuple[list[dict], list[str]]:
    """(rows with short side in pixels, prompt, text to score; names that could not be read)."""
    readable, broken = [], []
    for row in rows:
        try:
            image = open_image(row["file"])
        except Exception as e:  # noqa: BLE001  (Pillow raises a dozen classes for files that are no pictures)
            broken.append(row["file"])
            print(f"note: {row['file']} cannot be read and is left out ({type(e).__name__})", file=sys.stderr)
            continue
        text = prompt_of(str(image.info.get("parameters", ""))) if prompt is None else prompt.strip()
        if not text:
            raise ValueError(f"{row['file']} has no prompt to be scored with; give one: --prompt TEXT")
        readable.append({**row, "side": min(image.size), "prompt": text, "text": text})
    if not readable:
        raise ValueError(
            f"none of the {len(rows)} pictures can be read, {broken[0]} first; give some that can"
        )
    return readable, broken


def replace_token(rows: list[dict], token: str, words: str) -> None:
    """Sets `text`, what is scored. A token such as sks is found as a whole word only, never in "asks"."""
    if not token:
        raise ValueError('--replace-token has an empty TOKEN; give the pseudo word, e.g. "*"')
    edges = (r"(?<!\w)" if re.match(r"\w", token) else "", r"(?!\w)" if re.search(r"\w$", token) else "")
    for row in rows:
        row["text"] = re.sub(re.escape(token).join(edges), lambda _: words, row["prompt"])
    n = sum(row["text"] != row["prompt"] for row in rows)
    if not n:
        raise ValueError(
            f'none of the {len(rows)} prompts holds "{token}"; see --replace-token, or leave it away'
        )
    print(f'"{token}" replaced by "{words}" in {n} of {len(rows)} prompts')


def labels_of(presence: str | None) -> list[str]:
    labels = [x.strip() for x in (presence or "").split("|") if x.strip()]
    if presence is not None and len(set(labels)) < max(2, len(labels)):
        raise ValueError(
            f'--presence "{presence}" must name at least 2 different things, as in "a hanok|a barn"'
        )
    return labels


def choose_clip(rows: list[dict], clip: str | None):
    from hanokdiff.score import EXAMPLE, TINY

    largest = max(rows, key=lambda row: row["side"])
    if clip is None and largest["side"] > 64:
        raise ValueError(f"{largest['file']} is {largest['side']} px on its short side, but the embedded "
                         f"CLIP knows only the tiny world's 64; name another: --clip {EXAMPLE}")  # fmt: skip
    return TINY if clip in (None, "tiny") else clip


# --------------------------------------------------------------------------------------------- 2. the score


def score(clip, rows: list[dict], labels: list[str]) -> None:
    """Adds cosine, clipscore, x100 and `presence` (a label) to each row."""
    from hanokdiff.score import presence, scores

    images = clip.images(open_image(row["file"]) for row in rows)  # (N, d)
    for name, values in scores(clip, images, [row["text"] for row in rows]).items():
        for row, value in zip(rows, values.tolist(), strict=True):
            row[name] = value
    if labels:
        for row, i in zip(rows, presence(images, clip.texts(labels)).tolist(), strict=True):
            row["presence"] = labels[i]


def known(values: tuple) -> list:
    """The interval of a single value is nan, which JSON has not: None."""
    return [None if math.isnan(v) else v for v in values]


def summarise(rows: list[dict], labels: list[str]) -> list[dict]:
    """Of each folder, and of all where there are several: n, [value, low, high] of every score and label."""
    from hanokdiff.score import SCALES, mean_interval, share_interval

    groups = {row["folder"]: [r for r in rows if r["folder"] == row["folder"]] for row in rows}
    if len(groups) > 1:
        groups["all"] = rows
    summary = []
    for name, group in groups.items():
        means = {s: known(mean_interval([r[s] for r in group])) for s in SCALES}
        count = Counter(r.get("presence") for r in group)
        shares = {x: known(share_interval(count[x], len(group))) for x in labels}
        summary.append({"folder": name, "n": len(group), **means, "presence": shares})
    return summary


# ----------------------------------------------------------------------------------------------- 3. output


def table(*lines: list[str]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def interval(values: list, digits: int) -> str:
    value, low, high = values
    span = "(no interval)" if low is None else f"[{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f} {span}"


def show(report: dict, per_image: bool) -> None:
    print("scorer     CLIP {model}, {image_size} px, fp32 on {device}".format(**report["scorer"]))
    print(*(f"{name:10} {formula}" for name, formula in report["formulas"].items()), sep="\n")
    texts = Counter(row["text"] for row in report["images"]).most_common()
    print(f"texts      {len(texts)} scored" + ("" if len(texts) <= 5 else ", the 5 most frequent"))
    print(*(f'{n:>10} x "{text}"' for text, n in texts[:5]), sep="\n")
    if per_image:
        names = [k for k in report["images"][0] if k not in ("folder", "side", "prompt")]
        lines = [
            [f"{r[k]:.4f}" if isinstance(r[k], float) else r[k] for k in names] for r in report["images"]
        ]
        print("\n" + table(names, *lines))
    head, lines = ["folder", "n", "cosine", "CLIPScore", "100x"], []
    for r in report["summary"]:
        means = (interval(r["cosine"], 4), interval(r["clipscore"], 4), interval(r["x100"], 2))
        lines.append([r["folder"], str(r["n"]), *means])
    print("\n" + table(head, *lines))
    if labels := report["labels"]:
        lines = [[r["folder"], *(interval(r["presence"][x], 2) for x in labels)] for r in report["summary"]]
        print("\n" + table(["recognised as", *labels], *lines))
    print(f"\nintervals: {report['interval']}")


def temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def check_writable(path: Path) -> None:
    """Before the work, not after it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    try:
        temporary(path).touch()
        temporary(path).unlink()
    except OSError as e:
        raise ValueError(
            f"{path} cannot be written ({e.strerror}); name a file in a folder that exists"
        ) from None


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary(path).write_text(text, encoding="utf-8", newline="")
    os.replace(temporary(path), path)


def as_csv(rows: list[dict]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def run(o: argparse.Namespace) -> None:
    labels = labels_of(o.presence)
    for path in filter(None, (o.json, o.csv)):
        check_writable(path)
    rows, broken = read(collect(o.paths), o.prompt)
    if o.replace_token:
        replace_token(rows, *o.replace_token)
    model = choose_clip(rows, o.clip)

    from hanokdiff.score import SCALES, Clip  # from here on it takes seconds

    clip = Clip(model, o.device)
    score(clip, rows, labels)
    report = {
        "scorer": {"model": clip.name, "image_size": clip.size, "device": str(clip.device)},
        "formulas": {name: s.formula for name, s in SCALES.items()}, "interval": INTERVAL,
        "inputs": o.paths, "unreadable": broken, "labels": labels, "replaced": o.replace_token,
        "summary": summarise(rows, labels), "images": rows,
    }  # fmt: skip
    show(report, o.per_image)
    if o.json:
        write(o.json, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if o.csv:
        write(o.csv, as_csv(rows))


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        run(options)
    except (ValueError, OSError) as e:  # OSError: a disk that fills up or a folder that may not be read
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
