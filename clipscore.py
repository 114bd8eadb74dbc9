"""Pictures to scores: how well does each picture show what its prompt says, and what real pictures show?

    cosine        cos(E_picture, E_text), CLIP's two embeddings               Radford et al. 2021
    clipscore     2.5 max(cos, 0), "A photo depicts " before the text         Hessel et al. 2021, "CLIPScore"
    x100          100 max(cos, 0) without it                                  as torchmetrics prints
    clip_i        mean of cos(E_picture, E_reference) over the pictures of --reference
    nearest       the largest of them: near 1 is a copy, and of which file is printed
    refclipscore  2ab / (a + b) with a = clipscore, b = max(nearest, 0)       the same paper's RefCLIPScore

    python sample.py "a castle in the snow" --n 8 --out runs/castle
    python sample.py "a castle in the snow" --n 8 --out runs/short --steps 4
    python clipscore.py runs/castle --presence "a castle|a barn|a tent"
    python clipscore.py runs/castle runs/short --paired

prints the scorer, the exact texts it scored (the prompts that sample.py and the WebUI leave in their PNGs),
and for each folder the means and the share of pictures recognised as each thing, with 95 % intervals.
--paired subtracts pictures of the same prompt and seed, so that an easy prompt is easy for both. References
here are pictures, best real ones that no training saw; the paper's are captions: not comparable.

CLIPScore is blind to quality, reads a bag of words, and has a scale of its own per model: compare only under
one scorer. A pseudo word means nothing to it: --replace-token "*" "a hanok".
Read next: hanokdiff/scoring/clip.py (where it is computed), hanokdiff/compare/__main__.py (the experiment).
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
from hanokdiff.models.prompt_schedule import plain_text
from hanokdiff.models.tokens import contains_word, word_pattern
from hanokdiff.options import Options
from hanokdiff.scoring.clip import EXAMPLE, LIKENESS, SCALES, TINY_CLIP, Clip, likeness, presence, scores
from hanokdiff.scoring.stats import mean_interval, paired_interval, share_interval

INTERVAL = (
    "95 %, Student's t for means and differences, Wilson's for shares; pictures only, no other training"
)


def options() -> Options:
    p = Options(description=__doc__)
    folders = "folders are reported apart, not recursive"
    p.add_argument("paths", nargs="+", metavar="IMAGE_OR_FOLDER", help=folders)
    add = p.add_argument_group("what is asked").add_argument
    add("--prompt", metavar="TEXT", help="one text for all (default: the prompt in each PNG)")
    replace = {"nargs": 2, "action": "append", "default": [], "metavar": ("TOKEN", "WORDS")}
    add("--replace-token", **replace, help='e.g. "*" "a hanok"; repeatable')
    add("--presence", metavar="A|B|...", help="what share of pictures is recognised as A, as B ...")
    add("--reference", metavar="FOLDER", help="real pictures, held-out photos for example, to resemble")
    paired = "also the first of two folders minus the second, matched by prompt and seed"
    add("--paired", action="store_true", help=paired)
    add = p.add_argument_group("the scorer").add_argument
    add("--clip", metavar="FOLDER|HUB_ID", help="default: tiny, for pictures of at most 64 px only")
    add("--device", default="cpu", help="cpu, cuda ... (default: %(default)s, the same everywhere)")
    add = p.add_argument_group("output").add_argument
    add("--per-image", action="store_true", help="print a line for every picture")
    add("--json", type=Path, metavar="FILE", help="everything: scorer, formulas, every picture, summary")
    add("--csv", type=Path, metavar="FILE", help="a line for every picture")
    return p


# ------------------------------------------------------------------------------------------------ 1. input


def pictures_in(folder: Path) -> list[Path]:
    """Sorted by name; not the contact sheets (grid*.png, sheet*.png), not folders inside."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != ".")
    sheets = [f for f in files if re.match(r"(grid|sheet).*\.png$", f.name, re.IGNORECASE)]
    if sheets:
        print(f"note: {folder}: {len(sheets)} contact sheets skipped ({sheets[0].name})", file=sys.stderr)
    if len(files) == len(sheets):
        way = "folders inside are not searched, so give the one that holds them"
        raise ValueError(f"{folder} holds no pictures ({' '.join(sorted(SUFFIXES))}); {way}")
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
    """Prompt and seed in the WebUI's text: the prompt, "Negative prompt: ...", "Steps: 20, ..., Seed: 0"."""
    prompt = re.split(r"(?:^|\n)(?:Negative prompt|Steps):", parameters, maxsplit=1)[0].strip()
    seed = re.search(r"^Steps: .*\bSeed: (\d{1,19})\b", parameters, re.MULTILINE)
    return {"prompt": prompt, "seed": int(seed[1]) if seed else None}


def read_pictures(files) -> tuple[dict[str, dict], list[str]]:
    """({file: short side in pixels, prompt and seed}, names that could not be read, each printed)."""
    pictures, broken, flat = {}, [], []
    for file in map(str, files):
        try:
            side = min(read_photo(file)[0].size)
        except ValueError as e:
            broken.append(file)
            print(f"note: {file} is left out: {e}", file=sys.stderr)
            continue
        with Image.open(file) as image:
            image.load()  # a PNG's text may also stand at its end
            flat += [file] * all(low == high for low, high in image.convert("RGB").getextrema())
            pictures[file] = {"side": side, **origin(str(image.info.get("parameters", "")))}
    if flat:
        one = f"note: {len(flat)} pictures are of one colour (such as {flat[0]}), as a model makes them whose"
        print(f"{one} numbers overflow; they are scored like the others", file=sys.stderr)
    if not pictures:
        none = f"none of the {len(broken)} pictures can be read, {broken[0]} first"
        raise ValueError(f"{none}; give some that can")
    return pictures, broken


def set_texts(rows: list[dict], prompt: str | None, replace: list[tuple[str, str]]) -> None:
    """`text`, what is scored. A token such as sks is found as a whole word only, never in "asks"."""
    marked = 0
    for row in rows:
        asked = row["prompt"] if prompt is None else prompt.strip()
        row["text"] = plain_text(asked)
        marked += row["text"] != asked
        if not row["text"]:
            raise ValueError(f"{row['file']} has no prompt to be scored with; give one: --prompt TEXT")
    if marked:
        print(f"weights, tags and editing left out of {marked} of {len(rows)} prompts before they are scored")
    for token, words in replace:
        if not token.strip():
            raise ValueError('--replace-token has an empty TOKEN; give the pseudo word, e.g. "*"')
        n = sum(contains_word(row["text"], token) for row in rows)
        if not n:
            none = f'none of the {len(rows)} prompts holds "{token}"'
            raise ValueError(f"{none}; see --replace-token, or leave it away")
        for row in rows:
            row["text"] = word_pattern(token).sub(lambda _, words=words: words, row["text"])
        print(f'"{token}" replaced by "{words}" in {n} of {len(rows)} prompts')


def labels_of(presence: str | None) -> list[str]:
    labels = [x.strip() for x in (presence or "").split("|") if x.strip()]
    if presence is not None and len(set(labels)) < max(2, len(labels)):
        two = 'must name at least 2 different things, as in "a hanok|a barn"'
        raise ValueError(f'--presence "{presence}" {two}')
    return labels


def choose_clip(pictures: dict[str, dict], clip: str | None) -> str | Path:
    largest = max(pictures, key=lambda file: pictures[file]["side"])
    side = pictures[largest]["side"]
    if clip is None and side > 64:
        known = f"the embedded CLIP knows only the tiny world's 64; name another: --clip {EXAMPLE}"
        raise ValueError(f"{largest} is {side} px on its short side, but {known}")
    return TINY_CLIP if clip in (None, "tiny") else clip


# ----------------------------------------------------------------------------------------------- 2. scores


def add_scores(clip: Clip, rows: list[dict], labels: list[str], references: list[str]) -> None:
    """Every score to each row; `presence` is a label, `nearest_file` a reference."""
    images = clip.images(read_photo(row["file"])[0] for row in rows)  # (N, d)
    columns = scores(clip, images, [row["text"] for row in rows])
    which = None
    if references:
        files, paths = [row["file"] for row in rows], [Path(r).resolve() for r in references]
        same = [[Path(file).resolve() == path for path in paths] for file in files]
        real = clip.images(read_photo(f)[0] for f in references)  # (M, d)
        columns |= likeness(images, real, columns["clipscore"], torch.tensor(same))
        which = columns.pop("which").tolist()
    kinds = presence(images, clip.texts(labels)).tolist() if labels else None
    for i, row in enumerate(rows):
        row |= {name: values[i].item() for name, values in columns.items()}
        if which:
            row["nearest_file"] = references[which[i]]
        if kinds:
            row["presence"] = labels[kinds[i]]


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


# ------------------------------------------------------------------------------------------------ 3. pairs


def match(rows: list[dict], paths: list[str], prompt: str | None) -> dict:
    """The pairs (row of A, row of B), by prompt and seed where every picture has them, else by the file's
    name without its ending, and the files that have no partner."""
    by_seed = all(row["prompt"] and row["seed"] is not None for row in rows)
    # of the texts, unless all are one: in them --replace-token made "*" and "a hanok" equal
    column = "text" if prompt is None else "prompt"
    a, b = {}, {}
    for row in rows:
        key = f'"{row[column]}" with seed {row["seed"]}' if by_seed else Path(row["file"]).stem
        folder = a if Path(row["folder"]) == Path(paths[0]) else b
        if key in folder:
            both = f"{folder[key]['file']} and {row['file']} are both {key}"
            way = "take one of them out of its folder"
            raise ValueError(f"{both}, so it is uncertain which makes the pair; {way}")
        folder[key] = row
    by = "prompt and seed" if by_seed else "file name"
    if not a.keys() & b.keys():
        first, second = (next(iter(folder), "nothing readable") for folder in (a, b))
        none = f"no picture of {paths[0]} matches one of {paths[1]} by {by}"
        none += f" (the first ones: {first}; {second})"
        raise ValueError(f"{none}; draw both from the same prompts and seeds")
    unmatched = [(a | b)[k]["file"] for k in a | b if (k in a) != (k in b)]
    return {"by": by, "pairs": [(a[k], b[k]) for k in a if k in b], "unmatched": unmatched}


def differences(pairs: list[tuple[dict, dict]], names: list[str], labels: list[str]) -> dict:
    """Of every score, and of the share of every label: the means of A and B, and [A - B, low, high]."""
    sides = list(zip(*pairs, strict=True))
    values = {n: [[row[n] for row in side] for side in sides] for n in names}
    values |= {f"is {x}": [[float(row["presence"] == x) for row in side] for side in sides] for x in labels}
    return {
        n: {"a": fmean(a), "b": fmean(b), "difference": known(paired_interval(a, b))}
        for n, (a, b) in values.items()
    }


# ----------------------------------------------------------------------------------------------- 4. output


def print_table(*lines: list[str]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print("\n" + "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines))


def interval(values: list) -> str:
    value, low, high = values
    return f"{value:.4f} " + ("(no interval)" if low is None else f"[{low:.4f}, {high:.4f}]")


def show(report: dict, per_image: bool) -> None:
    images, formulas, summary = report["images"], report["formulas"], report["summary"]
    print("scorer        CLIP {model}, {image_size} px, fp32 on {device}".format(**report["scorer"]))
    print(*(f"{name:13} {formula}" for name, formula in formulas.items()), sep="\n")
    texts = Counter(row["text"] for row in images).most_common()
    print(f"texts         {len(texts)} scored" + ("" if len(texts) <= 5 else ", the 5 most frequent"))
    print(*(f'{n:>13} x "{text}"' for text, n in texts[:5]), sep="\n")
    if per_image:
        names = [k for k in images[0] if k not in ("folder", "side", "prompt", "seed")]
        lines = [[f"{r[k]:.4f}" if isinstance(r[k], float) else r[k] for k in names] for r in images]
        print_table(names, *lines)
    show_summary("folder", list(SCALES), summary)
    if report["reference"]:
        show_summary(f"like {report['reference']}", list(LIKENESS), summary)
        nearest = max(images, key=lambda r: r["nearest"])
        print("closest: {file} to {nearest_file}, {nearest:.4f}".format(**nearest))
    if report["labels"]:
        shares = [{**row, **row["presence"]} for row in summary]
        show_summary("recognised as", report["labels"], shares)
    if report["paired"]:
        show_paired(**report["paired"])
    print(f"\nintervals: {INTERVAL}")


def show_summary(head: str, names: list[str], summary: list[dict]) -> None:
    lines = [[r["folder"], str(r["n"]), *(interval(r[k]) for k in names)] for r in summary]
    print_table([head, "n", *names], *lines)


def show_paired(a: str, b: str, by: str, pairs: int, unmatched: list[str], scores: dict) -> None:
    lines = [[n, f"{v['a']:.4f}", f"{v['b']:.4f}", interval(v["difference"])] for n, v in scores.items()]
    print_table([f"{pairs} pairs", a, b, "first - second"], *lines)
    names = ", ".join(unmatched[:5]) + (", ..." if len(unmatched) > 5 else "")
    print(f"matched by {by}; {len(unmatched)} unmatched" + (f" ({names})" if unmatched else ""))


def as_csv(rows: list[dict]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def check(args) -> None:
    """What can be refused before the work."""
    for named, path in ((f"--json {args.json}", args.json), (f"--csv {args.csv}", args.csv)):
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f"{named} is a folder; name a file in it")
        if path.exists() and path.suffix.lower() not in (".json", ".csv"):
            raise ValueError(f"{named} is there and would be replaced; name one that ends in .json or .csv")
        folder = path.absolute().parent
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise ValueError(f"{named} cannot be written; name a file in a folder that exists and is yours")
    if args.json and args.csv and args.json.absolute() == args.csv.absolute():
        raise ValueError(f"--json and --csv are both {args.json}; name two files")
    folders = {Path(p).resolve() for p in args.paths if Path(p).is_dir()}
    if args.paired and not len(args.paths) == len(folders) == 2:
        are = f"of the {len(args.paths)} paths {len(folders)} are"
        way = "give two: clipscore.py A B --paired"
        raise ValueError(f"--paired compares 2 different folders, but {are}; {way}")


@report_errors
def main(argv=None):
    args = options().parse_args(argv)
    check(args)
    labels, folders = labels_of(args.presence), collect(args.paths)
    pictures, broken = read_pictures(folders)
    real = read_pictures(collect([args.reference]))[0] if args.reference else {}
    rows = [{"folder": folders[file], "file": file, **about} for file, about in pictures.items()]
    set_texts(rows, args.prompt, args.replace_token)
    paired = match(rows, args.paths, args.prompt) if args.paired else None

    clip = Clip(choose_clip(pictures | real, args.clip), args.device)
    add_scores(clip, rows, labels, list(real))
    formulas = {name: s.formula for name, s in SCALES.items()} | (LIKENESS if real else {})
    if paired:
        found = differences(paired["pairs"], list(formulas), labels)
        a, b = args.paths
        paired |= {"a": a, "b": b, "pairs": len(paired["pairs"]), "scores": found}
    name = "tiny" if clip.name == str(TINY_CLIP) else clip.name
    report = {
        "scorer": {"model": name, "image_size": clip.size, "device": str(clip.device)},
        "formulas": formulas,
        "interval": INTERVAL,
        "inputs": args.paths,
        "unreadable": broken,
        "labels": labels,
        "replaced": args.replace_token,
        "reference": args.reference,
        "references": list(real),
        "paired": paired,
        "summary": summarise(rows, list(formulas), labels),
        "images": rows,
    }
    show(report, args.per_image)
    if args.json:
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(args.json, text, newline="")
    if args.csv:
        write_text(args.csv, as_csv(rows), newline="")


if __name__ == "__main__":
    sys.exit(main())
