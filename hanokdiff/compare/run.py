"""One cell of a comparison: a training as a process of its own, its pictures, their scores, and what it all took.

    train     the very train_X.py, so that time and memory are true            CELL/run/
    draw      the same prompts from the same noise for every method            CELL/pictures-HASH/
    judge     the judge's opinion of every picture                             CELL/scores-HASH.json

Each does only what is missing. Read next: hanokdiff/scoring/clip.py (the scores), hanokdiff/compare/summary.py (what
they say).
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from PIL import PngImagePlugin

from hanokdiff.compare import plan
from hanokdiff.files import parse_json, read_json, replacing, write_json
from hanokdiff.formats import embedding_file, hypernet_file, lora_file
from hanokdiff.formats.load import load_model
from hanokdiff.images import read_photo
from hanokdiff.methods import hypernetwork, lora, textual_inversion
from hanokdiff.scoring.clip import presence, scores

# ------------------------------------------------------------------------------------------------------- 2. train


def note(path: Path, row: dict) -> None:
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def notes(path: Path) -> list[dict]:
    """The lines that are whole: the last one before a kill may not be."""
    rows = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            rows.append(parse_json(line, path))
    return rows


def train(cell: dict, home: Path) -> None:
    """Run the cell's train_X.py in its own folder, or let it go on. DreamBooth's class pictures come to lie there too:
    every cell pays for its own."""
    run = home / "run"
    if cell["method"] == "untouched" or (run / plan.METHODS[cell["method"]]).exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    device = cell["options"][cell["options"].index("--device") :][:2] if "--device" in cell["options"] else []
    how = (
        ["--resume", "run", *device] if (run / "config.json").exists() else [*cell["options"], "--out", "run"]
    )
    code, seconds, peak, stopped = process(
        [sys.executable, plan.SCRIPTS / f"train_{cell['method']}.py", *how], home
    )
    note(home / "attempts.jsonl", {"seconds": round(seconds, 2), "peak_bytes": peak, "machine": machine()})
    if stopped:
        raise KeyboardInterrupt
    if code:
        said = [
            line for line in (home / "log.txt").read_text("utf-8", "replace").splitlines() if line.strip()
        ]
        said = [line for line in said if line.startswith("error: ")] or said or ["no word"]
        reason = said[-1].removeprefix("error: ")
        raise ValueError(
            f"cell {cell['name']} could not be trained ({reason}); all it said is in {home / 'log.txt'}; "
            "the finished cells are kept"
        )


def process(argv: list, home: Path) -> tuple[int, float, int | None, bool]:
    """(exit code, seconds, peak bytes, stopped) of a child. Ctrl-C is passed on: the child saves its state and stops.

    Its peak is read from Linux while it runs: wait4's would begin with the parent's own, from before the exec."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    start, peak, stopped = time.perf_counter(), None, False
    with open(home / "log.txt", "ab") as log:
        child = subprocess.Popen(
            [str(a) for a in argv],
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # the terminal's Ctrl-C is for us; ours is for the child
            preexec_fn=libc and (lambda: libc.prctl(1, signal.SIGKILL)),
        )  # it ends when we do
        while (code := child.poll()) is None:
            try:
                if found := re.search(r"VmHWM:\s+(\d+) kB", status(child.pid)):
                    peak = int(found[1]) * 1024
                time.sleep(0.05)
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)
                stopped = True
    return code, time.perf_counter() - start, peak, stopped


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:  # another system, or it has just ended
        return ""


@cache
def machine() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{cpu[1] if cpu else 'CPU'} ({os.cpu_count()} cores), {gpu}, torch {torch.__version__}"


# ------------------------------------------------------------------------------------------------ 3. draw and score


@contextmanager
def applied(study: plan.Context, cell: dict, run: Path):
    """The base model with a cell's artefact in it, and afterwards as it was."""
    sd, file = study.sd, run / plan.METHODS.get(cell["method"], "")
    sd.text.add_word(study.token)
    if cell["method"] == "ti":
        word, rows = embedding_file.apply_file(sd, file, say=None)
        yield sd
        textual_inversion.remove(sd, word, rows)
    elif cell["method"] == "lora":
        before = lora.merge(sd, lora_file.apply_file(sd, file, say=None)[0])
        yield sd
        lora.unmerge(sd, before)
    elif cell["method"] == "hypernet":
        net, _ = hypernet_file.apply_file(sd, file, say=None)
        yield sd
        hypernetwork.remove(sd, net)
    elif cell["method"] == "dreambooth":
        yield load_model(str(file), str(sd.device), say=None)
    else:
        yield sd


def draw(study: plan.Context, cell: dict, home: Path, drawing: dict) -> None:
    """Every picture that is missing. Always in the same batches, so that a stopped study ends in the same pictures."""
    folder, at_once = home / cell["pictures"], 32 if drawing["size"] <= 64 else 4
    batches = [
        (q, range(k, min(k + at_once, q["n"]))) for q in cell["prompts"] for k in range(0, q["n"], at_once)
    ]
    todo = [(q, part) for q, part in batches if not all((folder / picture(q, i)).exists() for i in part)]
    if not todo:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with applied(study, cell, home / "run") as sd:
        for q, part in todo:
            start, seeds = time.perf_counter(), [noise(cell, q, i) for i in part]
            sd.text.literal_tokens = q["literal_tokens"]
            how = {k: drawing[k] for k in ("sampler", "steps", "cfg")} | {"size": (drawing["size"],) * 2}
            drawn = sd.draw([q["prompt"]] * len(part), seeds, at_once, **how)
            seconds = time.perf_counter() - start
            for i, seed, image in zip(part, seeds, drawn, strict=True):
                info = PngImagePlugin.PngInfo()
                info.add_text(
                    "parameters",
                    f"{q['prompt']}\nSteps: {how['steps']}, Sampler: {how['sampler']}, "
                    f"CFG scale: {how['cfg']:g}, Seed: {seed}, Size: {drawing['size']}x{drawing['size']}, "
                    f"Model: {cell['name']}",
                )
                with replacing(folder / picture(q, i)) as aside:
                    image.save(aside, "png", pnginfo=info)
            note(folder / "times.jsonl", {"pictures": len(part), "seconds": round(seconds, 3)})
            sd.text.literal_tokens = False


def picture(question: dict, i: int) -> str:
    return f"{question['key'].replace(' ', '-')}-{i:04d}.png"


def noise(cell: dict, question: dict, i: int) -> int:
    """The seed of a picture: the same for every method and size, another for each prompt and each training seed."""
    return 1_000_000 * cell["seed"] + question["noise"] + i


def score_images(study: plan.Context, cell: dict, home: Path) -> None:
    """The scores of the cell's pictures, and how different those of one prompt are."""
    file, out = home / cell["scores"], home.parent.parent
    if file.exists():
        return
    clip, rows, diversity = study.clip, [], {}
    photos = study.seen[: cell["photos"] or None]  # (P, d); untouched: all
    kinds, conditions = (clip.texts(list(c.values())) for c in (study.kinds, study.conditions))
    for q in cell["prompts"]:
        files = [f"{cell['folder']}/{cell['pictures']}/{picture(q, i)}" for i in range(q["n"])]
        seen = clip.images(read_photo(out / f)[0] for f in files)  # (N, d)
        texts = {name: scores(clip, seen, [t] * len(files)) for name, t in q["texts"].items()}
        near, kind = seen @ photos.T, presence(seen, kinds)
        condition, like = presence(seen, conditions), (seen @ study.held.T).mean(1)
        if len(files) > 1:
            same = seen @ seen.T
            diversity[q["key"]] = round(
                1 - (same.sum() - same.trace()).item() / (len(files) * (len(files) - 1)), 6
            )
        for i, f in enumerate(files):
            rows.append(
                {
                    "cell": cell["name"],
                    "method": cell["method"],
                    "photos": cell["photos"],
                    "seed": cell["seed"],
                    "question": q["key"],
                    "prompt": q["prompt"],
                    "index": i,
                    "noise": noise(cell, q, i),
                    "file": f,
                    **{
                        f"{s}_{t}": round(v[s][i].item(), 6)
                        for s in ("cosine", "clipscore")
                        for t, v in texts.items()
                    },
                    "kind": list(study.kinds)[kind[i]],
                    "condition": list(study.conditions)[condition[i]],
                    "subject": int(kind[i] == 0),
                    "wanted": int(condition[i] == 0),
                    "both": int(kind[i] == 0 and condition[i] == 0),
                    "likeness": round(like[i].item(), 6),
                    "nearest": round(near[i].max().item(), 6),
                    "nearest_photo": int(near[i].argmax()),
                }
            )
    write_json(file, {"diversity": diversity, "images": rows})


# -------------------------------------------------------------------------------------------- 4. what it took


def times(cell: dict, home: Path) -> dict:
    """Where the cell's time went, in seconds, and what it took; of a run that was stopped, all its parts."""
    attempts, log = (
        notes(home / "attempts.jsonl"),
        [r for r in notes(home / "run" / "log.jsonl") if "seconds" in r],
    )
    drawn = notes(home / cell["pictures"] / "times.jsonl")
    classes = home / "run" / "class.json"
    class_seconds = read_json(classes)["seconds"] if classes.exists() else 0.0
    seconds = log[-1]["seconds"] if log else 0.0
    wall = max(sum(a["seconds"] for a in attempts), class_seconds + seconds)
    artefact = home / "run" / plan.METHODS.get(cell["method"], "")
    files = [f for f in ([artefact] if artefact.is_file() else artefact.rglob("*")) if f.is_file()]
    return {
        "wall": wall,
        "class": class_seconds,
        "training": seconds,
        "other": wall - class_seconds - seconds,
        "sampling": sum(d["seconds"] for d in drawn),
        "pictures": sum(d["pictures"] for d in drawn),
        "steps_per_second": cell["steps"] / seconds if seconds else None,
        "peak_bytes": max((a["peak_bytes"] or 0 for a in attempts), default=0) or None,
        "gpu_bytes": max((r.get("gpu_bytes", 0) for r in log), default=0) or None,
        "file_bytes": sum(f.stat().st_size for f in files) if cell["method"] != "untouched" else None,
        "machine": attempts[-1]["machine"] if attempts else None,
    }


def curve(home: Path) -> list[list]:
    """[[step, loss of the held-out photos], ...] along the training."""
    return [[r["step"], r["held_out"]] for r in notes(home / "run" / "log.jsonl") if "held_out" in r]
