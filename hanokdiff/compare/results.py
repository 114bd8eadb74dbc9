"""The folder of a comparison: its manifest, the finished cells in it, and several folders joined into one."""

import os
import shutil
from pathlib import Path

from hanokdiff.compare import report, run
from hanokdiff.files import read_json

MOST_BYTES = 1 << 30  # of a JSON file: the scores of 240,000 pictures


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


def collect(out: Path, manifest: dict) -> dict:
    """The manifest with the results of the finished cells."""
    cells, missing = [], []
    for cell in manifest["cells"]:
        folder = out / cell["folder"]
        file = folder / cell["scores"]
        if not file.exists():
            missing.append(cell["name"])
            continue
        found = {k: v for k, v in cell.items() if k != "options"} | read_json(file, MOST_BYTES)
        pictures = Path(cell["folder"], cell["pictures"])
        for image in found["images"]:
            if Path(image["file"]).parent != pictures:
                raise ValueError(
                    f"{file} names {image['file']!r}, which is no picture of that cell; delete it"
                )
        cells.append(found | {"times": run.times(cell, folder), "held_out": run.validation_curve(folder)})
    return {**manifest, "cells": cells, "missing": missing}


def write_report(out: Path, manifest: dict) -> tuple[dict, str]:
    """The results of the finished cells, and the table of the report that is written of them."""
    try:
        results = collect(out, manifest)
        return results, report.write(out, results)
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
