"""The folder of a comparison: its manifest, the finished cells in it, and several folders joined into one."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from hanokdiff.compare import report, run
from hanokdiff.files import read_json

MOST_BYTES = 1 << 30  # of a JSON file: the scores of 240,000 pictures
MEANS = (
    "likeness",
    "nearest",
    *(f"{s}_{t}" for s in ("cosine", "clipscore") for t in ("literal", "words", "context")),
)
COUNTS = ("subject", "wanted", "both", "copy")


def read_manifest(folder: Path) -> dict:
    """A comparison's manifest. What is in it becomes paths, so that every name must be a plain one."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"--merge {folder}: no comparison was started there (it has no manifest.json)")
    manifest = read_json(path, MOST_BYTES)
    try:
        names = [n for c in manifest["cells"] for n in (*Path(c["folder"]).parts, c["pictures"], c["scores"])]
        plain = all(c["folder"].startswith("cells/") for c in manifest["cells"])
        wrong = next((n for n in names if Path(n).name != n or n in ("", "..")), None)
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is no comparison's ({e!r}); fetch it again") from None
    if wrong is not None or not plain:
        raise ValueError(f"{path} names {wrong!r}, which is outside of its folder; fetch it again")
    return manifest


def collect(out: Path, manifest: dict) -> tuple[dict, list[dict]]:
    """The manifest with what the finished cells have found, prompt by prompt; and the scores of each
    picture."""
    cells, images, missing = [], [], []
    for cell in manifest["cells"]:
        folder = out / cell["folder"]
        file = folder / cell["scores"]
        if not file.exists():
            missing.append(cell["name"])
            continue
        scores = read_json(file, MOST_BYTES)
        pictures = Path(cell["folder"], cell["pictures"])
        for image in scores["images"]:
            if Path(image["file"]).parent != pictures:
                raise ValueError(
                    f"{file} names {image['file']!r}, which is no picture of that cell; delete it"
                )
        images += scores["images"]
        found = {k: v for k, v in cell.items() if k not in ("options", "prompts")}
        found["asked"] = {q["key"]: q["prompt"] for q in cell["prompts"]}
        found["found"] = {key: counted(scores, key) for key in found["asked"]}
        cells.append(found | {"times": run.times(cell, folder), "held_out": run.validation_curve(folder)})
    return {**manifest, "cells": cells, "missing": missing}, images


def counted(scores: dict, key: str) -> dict:
    """Of the pictures of one prompt: how many, of how many each is true, and [mean, standard deviation] of
    each score. The report knows no more."""
    images = [image for image in scores["images"] if image["question"] == key]
    found: dict = {"pictures": len(images)} | {name: sum(i[name] for i in images) for name in COUNTS}
    for name in MEANS:
        values = np.array([i[name] for i in images])
        found[name] = [round(float(v), 6) for v in (values.mean(), values.std(ddof=min(1, len(values) - 1)))]
    found["kinds"] = dict(Counter(i["kind"] for i in images))
    found["conditions"] = dict(Counter(i["condition"] for i in images))
    found["diversity"] = scores["diversity"].get(key)
    return found


def write_report(out: Path, manifest: dict) -> tuple[dict, str]:
    """The results of the finished cells, and the table of the report that is written of them."""
    try:
        results, images = collect(out, manifest)
        return results, report.write(out, results, images)
    except (AttributeError, IndexError, KeyError, TypeError, ZeroDivisionError) as e:
        if os.environ.get("HANOKDIFF_DEBUG"):
            raise
        raise ValueError(
            f"{out}: a manifest.json or scores-*.json in it is not what this version writes ({e!r}); "
            "delete that cell, or compare anew in another folder"
        ) from None


def merge(folders: list[Path], out: Path) -> dict:
    """Copy the finished cells of folders that were started with the same settings; their manifest."""
    manifests = [read_manifest(folder) for folder in folders]
    plans = [[(c["folder"], c["pictures"], c["scores"]) for c in m["cells"]] for m in manifests]
    for folder, other in zip(folders, plans, strict=True):
        if other != plans[0]:
            differ = sum(a != b for a, b in zip(plans[0], other)) + abs(len(plans[0]) - len(other))
            raise ValueError(
                f"{folder} was started with other settings than {folders[0]}: {differ} cells differ; "
                "merge the shards of one comparison"
            )
    for folder in folders:
        for cell, _, scores in plans[0]:
            if (folder / cell / scores).exists() and not (out / cell / scores).exists():
                shutil.copytree(folder / cell, out / cell, dirs_exist_ok=True)
    return manifests[0]
