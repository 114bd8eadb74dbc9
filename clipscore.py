"""Pictures to scores: how well does each picture show what its prompt says, and what real pictures show?

    cosine        cos(E_picture, E_text), CLIP's two embeddings                       Radford et al. 2021
    clipscore     2.5 max(cos, 0), "A photo depicts " before the text                 Hessel et al. 2021, "CLIPScore"
    x100          100 max(cos, 0) without it                                          as torchmetrics prints
    clip_i        mean of cos(E_picture, E_reference) over the pictures of --reference
    nearest       the largest of them: near 1 is a copy, and of which file is told
    refclipscore  2ab / (a + b) with a = clipscore, b = max(nearest, 0)               the same paper's RefCLIPScore

    python sample.py "a castle in the snow" --n 8 --out runs/castle
    python sample.py "a castle in the snow" --n 8 --out runs/short --steps 4
    python clipscore.py runs/castle --presence "a castle|a barn|a tent"
    python clipscore.py runs/castle runs/short --paired

prints the scorer, the exact texts it scored (the prompts that sample.py and the WebUI leave in their PNGs), and for
each folder the means and the share of pictures recognised as each thing, with 95 % intervals.  --paired subtracts
pictures of the same prompt and seed, so that an easy prompt is easy for both.  References here are pictures, best
real ones that no training saw; the paper's are captions, so its RefCLIPScores are not to be compared with these.

CLIPScore is blind to quality, reads a bag of words, and has a scale of its own per model: compare only under one
scorer.  A pseudo word means nothing to it: --replace-token "*" "a hanok".
Read next: hanokdiff/scoring/clip.py (where it is computed), hanokdiff/compare/__main__.py (the experiment that uses
it).
"""

import csv
import io
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image

from hanokdiff.errors import report_errors
from hanokdiff.files import write_text
from hanokdiff.images import SUFFIXES, read_photo
from hanokdiff.models.tokens import contains_word, word_pattern
from hanokdiff.options import Options
from hanokdiff.scoring.clip import EXAMPLE, LIKENESS, SCALES, TINY_CLIP, Clip, likeness, presence, scores
from hanokdiff.scoring.stats import mean_interval, paired_interval, share_interval

INTERVAL = (
    "95 %, Student's t for means and differences, Wilson's for shares; pictures only, no other training"
)


def options() -> Options:
    p = Options(description=__doc__)
    p.add_argument(
        "paths", nargs="+", metavar="IMAGE_OR_FOLDER", help="folders are reported apart, not recursive"
    )
    what, scorer, out = (p.add_argument_group(g) for g in ("what is asked", "the scorer", "output"))
    what.add_argument("--prompt", metavar="TEXT", help="one text for all (default: the prompt in each PNG)")
    what.add_argument(
        "--replace-token",
        nargs=2,
        action="append",
        default=[],
        metavar=("TOKEN", "WORDS"),
        help='e.g. "*" "a hanok"; repeatable',
    )
    what.add_argument(
        "--presence", metavar="A|B|...", help="what share of pictures is recognised as A, as B ..."
    )
    what.add_argument(
        "--reference", metavar="FOLDER", help="real pictures, held-out photos for example, to resemble"
    )
    what.add_argument(
        "--paired",
        action="store_true",
        help="also the first of two folders minus the second, matched by prompt and seed",
    )
    scorer.add_argument(
        "--clip", metavar="FOLDER|HUB_ID", help="default: tiny, for pictures of at most 64 px only"
    )
    scorer.add_argument(
        "--device", default="cpu", help="cpu, cuda ... (default: %(default)s, the same everywhere)"
    )
    out.add_argument("--per-image", action="store_true", help="print a line for every picture")
    out.add_argument(
        "--json", type=Path, metavar="FILE", help="everything: scorer, formulas, every picture, summary"
    )
    out.add_argument("--csv", type=Path, metavar="FILE", help="a line for every picture")
    return p


# --------------------------------------------------------------------------------------------------- 1. input


def pictures_in(folder: Path) -> list[Path]:
    """Sorted by name; not the contact sheets (grid*.png, sheet*.png), not folders inside."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != ".")
    sheets = [f for f in files if re.match(r"(grid|sheet).*\.png$", f.name, re.IGNORECASE)]
    if sheets:
        print(f"note: {folder}: {len(sheets)} contact sheets skipped ({sheets[0].name})", file=sys.stderr)
    if len(files) == len(sheets):
        raise ValueError(
            f"{folder} holds no pictures ({' '.join(sorted(SUFFIXES))}); folders inside are not "
            "searched, so give the one that holds them"
        )
    return [f for f in files if f not in sheets]


def collect(paths: list[str]) -> dict[str, str]:
    """File to folder of every picture, none twice. Those given by name are one group."""
    found = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist; give pictures, or folders of them")
        for f in pictures_in(path) if path.is_dir() else [path]:
            found.setdefault(f.resolve(), (str(f), str(path) if path.is_dir() else "(files)"))
    return dict(found.values())


def origin(parameters: str) -> dict:
    """Prompt and seed in what the WebUI writes: the prompt, "Negative prompt: ...", "Steps: 20, ..., Seed: 0, ..."."""
    prompt = re.split(r"(?:^|\n)(?:Negative prompt|Steps):", parameters, maxsplit=1)[0].strip()
    seed = re.search(r"^Steps: .*\bSeed: (\d{1,19})\b", parameters, re.MULTILINE)
    return {"prompt": prompt, "seed": int(seed[1]) if seed else None}


def look(files) -> tuple[dict[str, dict], list[str]]:
    """({file: short side in pixels, prompt and seed}, names that could not be read, each told)."""
    seen, broken = {}, []
    for file in map(str, files):
        try:
            side = min(read_photo(file)[0].size)
        except ValueError as e:
            broken.append(file)
            print(f"note: {file} is left out: {e}", file=sys.stderr)
            continue
        with Image.open(file) as image:
            image.load()  # a PNG's text may also stand at its end
            seen[file] = {"side": side, **origin(str(image.info.get("parameters", "")))}
    if not seen:
        raise ValueError(
            f"none of the {len(broken)} pictures can be read, {broken[0]} first; give some that can"
        )
    return seen, broken


def set_texts(rows: list[dict], prompt: str | None, replace: list[tuple[str, str]]) -> None:
    """`text`, what is scored. A token such as sks is found as a whole word only, never in "asks"."""
    for row in rows:
        row["text"] = row["prompt"] if prompt is None else prompt.strip()
        if not row["text"]:
            raise ValueError(f"{row['file']} has no prompt to be scored with; give one: --prompt TEXT")
    for token, words in replace:
        if not token.strip():
            raise ValueError('--replace-token has an empty TOKEN; give the pseudo word, e.g. "*"')
        n = sum(contains_word(row["text"], token) for row in rows)
        if not n:
            raise ValueError(
                f'none of the {len(rows)} prompts holds "{token}"; see --replace-token, or leave it away'
            )
        for row in rows:
            row["text"] = word_pattern(token).sub(lambda _, words=words: words, row["text"])
        print(f'"{token}" replaced by "{words}" in {n} of {len(rows)} prompts')


def labels_of(presence: str | None) -> list[str]:
    labels = [x.strip() for x in (presence or "").split("|") if x.strip()]
    if presence is not None and len(set(labels)) < max(2, len(labels)):
        raise ValueError(
            f'--presence "{presence}" must name at least 2 different things, as in "a hanok|a barn"'
        )
    return labels


def choose_clip(seen: dict[str, dict], clip: str | None):
    largest = max(seen, key=lambda file: seen[file]["side"])
    if clip is None and seen[largest]["side"] > 64:
        raise ValueError(
            f"{largest} is {seen[largest]['side']} px on its short side, but the embedded CLIP knows only "
            f"the tiny world's 64; name another: --clip {EXAMPLE}"
        )
    return TINY_CLIP if clip in (None, "tiny") else clip


# ------------------------------------------------------------------------------------------------- 2. the score


def add_scores(clip, rows: list[dict], labels: list[str], references: list[str]) -> None:
    """Every score to each row; `presence` is a label, `nearest_file` a reference."""
    images = clip.images(read_photo(row["file"])[0] for row in rows)  # (N, d)
    columns = scores(clip, images, [row["text"] for row in rows])
    if references:
        files, paths = (
            [Path(f).resolve() for f in some] for some in ([row["file"] for row in rows], references)
        )
        own = torch.tensor([[file == path for path in paths] for file in files])  # (N, M)
        real = clip.images(read_photo(f)[0] for f in references)  # (M, d)
        columns |= likeness(images, real, columns["clipscore"], own)
    columns = {name: values.tolist() for name, values in columns.items()}
    if references:
        columns["nearest_file"] = [references[i] for i in columns.pop("which")]
    if labels:
        columns["presence"] = [labels[i] for i in presence(images, clip.texts(labels))]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value


def known(values: tuple) -> list:
    """A single value, or values all alike, have no interval: None, not nan, which JSON has not."""
    return list(values) if values[1] < values[2] else [values[0], None, None]


def summarise(rows: list[dict], names: list[str], labels: list[str]) -> list[dict]:
    """Of each folder, and of all where there are several: n, [value, low, high] of every score and label."""
    groups = {row["folder"]: [r for r in rows if r["folder"] == row["folder"]] for row in rows}
    if len(groups) > 1:
        groups["all"] = rows
    summary = []
    for folder, group in groups.items():
        means = {name: known(mean_interval([r[name] for r in group])) for name in names}
        count = Counter(r.get("presence") for r in group)
        shares = {x: known(share_interval(count[x], len(group))) for x in labels}
        summary.append({"folder": folder, "n": len(group), **means, "presence": shares})
    return summary


# ---------------------------------------------------------------------------------------------------- 3. pairs


def match(rows: list[dict], paths: list[str], prompt: str | None) -> dict:
    """The pairs (row of A, row of B), by prompt and seed where every picture tells them, else by the file's name
    without its ending, and the files that have no partner."""
    drawn = all(row["prompt"] and row["seed"] is not None for row in rows)
    asked = (
        "text" if prompt is None else "prompt"
    )  # of the texts: there --replace-token made "*" and "a hanok" equal
    a, b = {}, {}
    for row in rows:
        key = f'"{row[asked]}" with seed {row["seed"]}' if drawn else Path(row["file"]).stem
        other = (a if Path(row["folder"]) == Path(paths[0]) else b).setdefault(key, row)
        if other is not row:
            raise ValueError(
                f"{other['file']} and {row['file']} are both {key}, so it is uncertain which makes the "
                "pair; take one of them out of its folder"
            )
    by = "prompt and seed" if drawn else "file name"
    if not a.keys() & b.keys():
        first, second = (next(iter(side), "nothing readable") for side in (a, b))
        raise ValueError(
            f"no picture of {paths[0]} matches one of {paths[1]} by {by} (the first ones: {first}; "
            f"{second}); draw both from the same prompts and seeds"
        )
    return {
        "by": by,
        "pairs": [(a[k], b[k]) for k in a if k in b],
        "unmatched": [row["file"] for k, row in [*a.items(), *b.items()] if k not in a or k not in b],
    }


def differences(pairs: list[tuple[dict, dict]], names: list[str], labels: list[str]) -> dict:
    """Of every score, and of the share of every label: the means of A and B, and [A - B, low, high]."""
    sides = list(zip(*pairs, strict=True))
    values = {n: [[row[n] for row in side] for side in sides] for n in names}
    values |= {f"is {x}": [[float(row["presence"] == x) for row in side] for side in sides] for x in labels}
    return {
        n: {"a": fmean(a), "b": fmean(b), "difference": known(paired_interval(a, b))}
        for n, (a, b) in values.items()
    }


# --------------------------------------------------------------------------------------------------- 4. output


def table(*lines: list[str]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n" + "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def interval(values: list) -> str:
    value, low, high = values
    return f"{value:.4f} " + ("(no interval)" if low is None else f"[{low:.4f}, {high:.4f}]")


def show(report: dict, per_image: bool) -> None:
    images, formulas = report["images"], report["formulas"]
    print("scorer        CLIP {model}, {image_size} px, fp32 on {device}".format(**report["scorer"]))
    print(*(f"{name:13} {formula}" for name, formula in formulas.items()), sep="\n")
    texts = Counter(row["text"] for row in images).most_common()
    print(f"texts         {len(texts)} scored" + ("" if len(texts) <= 5 else ", the 5 most frequent"))
    print(*(f'{n:>13} x "{text}"' for text, n in texts[:5]), sep="\n")
    if per_image:
        names = [k for k in images[0] if k not in ("folder", "side", "prompt", "seed")]
        print(
            table(
                names, *([f"{r[k]:.4f}" if isinstance(r[k], float) else r[k] for k in names] for r in images)
            )
        )

    def means(head, names, of=lambda r: r):
        if names:
            print(
                table(
                    [head, "n", *names],
                    *(
                        [r["folder"], str(r["n"]), *(interval(of(r)[k]) for k in names)]
                        for r in report["summary"]
                    ),
                )
            )

    means("folder", list(SCALES))
    means(f"like {report['reference']}", [name for name in formulas if name not in SCALES])
    if report["reference"]:
        print(
            "closest: {file} to {nearest_file}, {nearest:.4f}".format(
                **max(images, key=lambda r: r["nearest"])
            )
        )
    means("recognised as", report["labels"], lambda r: r["presence"])
    if report["paired"]:
        show_paired(**report["paired"])
    print(f"\nintervals: {INTERVAL}")


def show_paired(a: str, b: str, by: str, pairs: int, unmatched: list[str], scores: dict) -> None:
    lines = [
        [name, f"{v['a']:.4f}", f"{v['b']:.4f}", interval(v["difference"])] for name, v in scores.items()
    ]
    print(table([f"{pairs} pairs", a, b, "first - second"], *lines))
    names = ", ".join(unmatched[:5]) + (", ..." if len(unmatched) > 5 else "")
    print(f"matched by {by}; {len(unmatched)} unmatched" + (f" ({names})" if unmatched else ""))


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    write_text(path, text, newline="")


def as_csv(rows: list[dict]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def check(o) -> None:
    """What can be refused before the work."""
    for option, path in (("--json", o.json), ("--csv", o.csv)):
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f"{option} {path} is a folder; name a file in it")
        if path.exists() and path.suffix.lower() not in (".json", ".csv"):
            raise ValueError(
                f"{option} {path} is there and would be replaced; name one that ends in .json or .csv"
            )
        if not (path.absolute().parent.is_dir() and os.access(path.absolute().parent, os.W_OK)):
            raise ValueError(
                f"{option} {path} cannot be written; name a file in a folder that exists and is yours"
            )
    if o.json and o.csv and o.json.absolute() == o.csv.absolute():
        raise ValueError(f"--json and --csv are both {o.json}; name two files")
    folders = {Path(p).resolve() for p in o.paths if Path(p).is_dir()}
    if o.paired and not len(o.paths) == len(folders) == 2:
        raise ValueError(
            f"--paired compares 2 different folders, but of the {len(o.paths)} paths {len(folders)} are; "
            "give two: clipscore.py A B --paired"
        )


@report_errors
def main(argv=None):
    o = options().parse_args(argv)
    check(o)
    labels, folders = labels_of(o.presence), collect(o.paths)
    seen, broken = look(folders)
    real = look(collect([o.reference]))[0] if o.reference else {}
    rows = [{"folder": folders[file], "file": file, **told} for file, told in seen.items()]
    set_texts(rows, o.prompt, o.replace_token)
    paired = match(rows, o.paths, o.prompt) if o.paired else None

    clip = Clip(choose_clip({**seen, **real}, o.clip), o.device)
    add_scores(clip, rows, labels, list(real))
    formulas = {name: s.formula for name, s in SCALES.items()} | (LIKENESS if real else {})
    if paired:
        pairs = paired["pairs"]
        paired |= {
            "a": o.paths[0],
            "b": o.paths[1],
            "pairs": len(pairs),
            "scores": differences(pairs, list(formulas), labels),
        }
    report = {
        "scorer": {
            "model": "tiny" if clip.name == str(TINY_CLIP) else clip.name,
            "image_size": clip.size,
            "device": str(clip.device),
        },
        "formulas": formulas,
        "interval": INTERVAL,
        "inputs": o.paths,
        "unreadable": broken,
        "labels": labels,
        "replaced": o.replace_token,
        "reference": o.reference,
        "references": list(real),
        "paired": paired,
        "summary": summarise(rows, list(formulas), labels),
        "images": rows,
    }
    show(report, o.per_image)
    if o.json:
        write(o.json, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if o.csv:
        write(o.csv, as_csv(rows))


if __name__ == "__main__":
    sys.exit(main())
