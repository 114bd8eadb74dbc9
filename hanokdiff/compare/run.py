"""One cell of a comparison: a training as a process of its own, its pictures, their scores, its costs.

    train           the very train_X.py, so that time and memory are true      CELL/run/
    draw            the same prompts from the same noise for every method      CELL/pictures-HASH/
    score_images    every picture by CLIP                                      CELL/scores-HASH.json

Each does only what is missing. Read next: hanokdiff/scoring/clip.py (the scores),
hanokdiff/compare/summary.py (the statistics).
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
from torch import Tensor

from hanokdiff.compare import plan
from hanokdiff.files import parse_json, read_json, write_json
from hanokdiff.formats import embedding_file, hypernet_file, lora_file
from hanokdiff.formats.load import load_model
from hanokdiff.images import read_photo, webui_parameters, write_png
from hanokdiff.methods import hypernetwork, lora, textual_inversion
from hanokdiff.scoring.clip import presence, scores

# --------------------------------------------------------------------------------------------- 1. training


def append_line(path: Path, entry: dict) -> None:
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(entry) + "\n")


def read_lines(path: Path) -> list[dict]:
    """The lines that are whole: the last one before a kill may not be."""
    entries = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            entries.append(parse_json(line, path))
    return entries


def train(cell: dict, folder: Path) -> None:
    """Run the cell's train_X.py, or resume it, in the comparison's folder: trainings on the same photos find
    each other's class pictures in its runs/class. What they cost is counted for each (`times`)."""
    run = folder / "run"
    if cell["method"] == "untouched" or (run / plan.METHODS[cell["method"]]).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    inside = f"{folder.parent.name}/{folder.name}/run"
    argv = [*cell["options"], "--out", inside]
    if (run / "config.json").exists():
        at = argv.index("--device") if "--device" in argv else len(argv)
        argv = ["--resume", inside, *argv[at : at + 2]]
    torch.cuda.empty_cache()  # what this process holds in reserve from drawing, the training may need
    script = plan.SCRIPTS / f"train_{cell['method']}.py"
    code, seconds, peak, stopped = process([sys.executable, script, *argv], folder)
    attempt = {"seconds": round(seconds, 2), "peak_bytes": peak, "machine": machine()}
    attempt["threads"] = torch.get_num_threads()
    append_line(folder / "attempts.jsonl", attempt)
    if stopped:
        raise KeyboardInterrupt
    if code:
        raise ValueError(
            f"cell {cell['name']} could not be trained ({last_error(folder / 'log.txt')}); its output is in "
            f"{folder / 'log.txt'}; the finished cells are kept"
        )


def last_error(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")] or lines or ["without a message"]
    return errors[-1].removeprefix("error: ")


def process(argv: list, folder: Path) -> tuple[int, float, int | None, bool]:
    """(exit code, seconds, peak bytes, stopped) of a child that runs two folders above this one and logs into
    it. Ctrl-C is passed on: the child saves its state and stops.

    Its peak is read from Linux while it runs: wait4's would begin with the parent's own, from before the
    exec."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    start, peak, stopped = time.perf_counter(), None, False
    with open(folder / "log.txt", "ab") as log:
        child = subprocess.Popen(
            [str(a) for a in argv],
            cwd=folder.parent.parent,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # the terminal's Ctrl-C reaches this process, which passes it on
            preexec_fn=libc and (lambda: libc.prctl(1, signal.SIGKILL)),  # it ends when this process does
        )
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


# --------------------------------------------------------------------------------------------- 2. pictures


@contextmanager
def applied(context: plan.Context, cell: dict, run: Path):
    """The base model with a cell's artefact in it, and afterwards as it was."""
    sd, file = context.sd, artefact(cell, run)
    sd.text.add_word(context.token)
    if cell["method"] == "ti":
        word, vectors = embedding_file.apply_file(sd, file, log=None)
        yield sd
        textual_inversion.remove(sd, word, vectors)
    elif cell["method"] == "lora":
        before = lora.merge(sd, lora_file.apply_file(sd, file, cell["strength"], log=None)[0])
        yield sd
        lora.unmerge(sd, before)
    elif cell["method"] == "hypernet":
        net, _ = hypernet_file.apply_file(sd, file, cell["strength"], log=None)
        yield sd
        hypernetwork.remove(sd, net)
    elif cell["method"] == "dreambooth":
        yield load_model(str(file), str(sd.device), log=None)
    else:
        yield sd
    if embedding := textual_inversion.find(sd, context.token):  # that was trained beside the rest
        textual_inversion.remove(sd, context.token, embedding)


def artefact(cell: dict, run: Path) -> Path:
    """What a training has left, at the step that the cell is about."""
    file = run / plan.METHODS.get(cell["method"], "")
    step = plan.step_at(cell["at"], cell["steps"])
    return file if cell["at"] == 1 else file.with_stem(f"{file.stem}-{step:06d}")


def draw(context: plan.Context, cell: dict, folder: Path, drawing: dict) -> None:
    """Every picture that is missing, in batches that stay the same: rounding depends on the batch, and a
    comparison that was stopped must end in the same pictures."""
    pictures, size = folder / cell["pictures"], drawing["size"]
    batch_size = 32 if size <= 64 else 4
    todo = []
    for q in cell["prompts"]:
        for first in range(0, q["n"], batch_size):
            batch = range(first, min(first + batch_size, q["n"]))
            if not all((pictures / file_name(q, i)).exists() for i in batch):
                todo.append((q, batch))
    if not todo:
        return
    pictures.mkdir(parents=True, exist_ok=True)
    options = {k: drawing[k] for k in ("sampler", "steps", "cfg")} | {"size": (size, size)}
    with applied(context, cell, folder / "run") as sd:
        for q, batch in todo:
            start, seeds = time.perf_counter(), [noise_seed(cell, q, i) for i in batch]
            sd.text.literal_tokens = q["literal_tokens"]
            drawn = sd.draw([q["prompt"]] * len(batch), seeds, batch_size, **options)
            seconds = time.perf_counter() - start
            for i, seed, image in zip(batch, seeds, drawn, strict=True):
                how = (drawing["steps"], drawing["sampler"], drawing["cfg"], seed, (size, size), cell["name"])
                info = {"parameters": webui_parameters(q["prompt"], *how)}
                write_png(pictures / file_name(q, i), image, info)
            append_line(pictures / "times.jsonl", {"pictures": len(batch), "seconds": round(seconds, 3)})
            sd.text.literal_tokens = False


def file_name(question: dict, i: int) -> str:
    return f"{question['key'].replace(' ', '-')}-{i:04d}.png"


def noise_seed(cell: dict, question: dict, i: int) -> int:
    """Of picture i: the same for every method and size, another for each prompt and each training seed."""
    return 1_000_000 * cell["seed"] + question["noise"] + i


# ----------------------------------------------------------------------------------------------- 3. scores


def score_images(context: plan.Context, cell: dict, folder: Path) -> None:
    """The scores of the cell's pictures, and how different those of one prompt are."""
    file = folder / cell["scores"]
    if file.exists():
        return
    images, diversity = [], {}
    for q in cell["prompts"]:
        files = [f"{cell['folder']}/{cell['pictures']}/{file_name(q, i)}" for i in range(q["n"])]
        out = folder.parent.parent
        embeddings = context.clip.images(read_photo(out / f)[0] for f in files)  # (N, d)
        if (n := len(files)) > 1:
            cosines = embeddings @ embeddings.T  # (N, N)
            diversity[q["key"]] = round(1 - (cosines.sum() - cosines.trace()).item() / (n * (n - 1)), 6)
        for i, measured in enumerate(measure(context, cell, q, embeddings)):
            about = {
                **{k: cell[k] for k in ("recipe", "method", "photos", "seed", "at", "strength")},
                "question": q["key"],
                "prompt": q["prompt"],
                "index": i,
                "noise": noise_seed(cell, q, i),
                "file": files[i],
            }
            images.append(about | measured)
    write_json(file, {"diversity": diversity, "images": images})


def measure(context: plan.Context, cell: dict, question: dict, embeddings: Tensor) -> list[dict]:
    """Every score of the pictures of one prompt, whose embeddings these are (N, d)."""
    clip, n = context.clip, len(embeddings)
    photos = context.photos(cell["photo_set"])[1][: cell["photos"] or None]  # (P, d); untouched: all
    limit = context.copy_level(cell["photo_set"], cell["photos"] or context.most)
    near = embeddings @ photos.T  # (N, P)
    kinds, conditions = list(context.kinds), list(context.conditions)  # labels
    kind = presence(embeddings, clip.texts(list(context.kinds.values()))).tolist()
    condition = presence(embeddings, clip.texts(list(context.conditions.values()))).tolist()
    likeness = (embeddings @ context.held_out_embeddings.T).mean(1)
    by_text = {t: scores(clip, embeddings, [text] * n) for t, text in question["texts"].items()}
    named = {f"{s}_{t}": v[s] for s in ("cosine", "clipscore") for t, v in by_text.items()}
    return [
        {
            **{name: round(values[i].item(), 6) for name, values in named.items()},
            "kind": kinds[kind[i]],
            "condition": conditions[condition[i]],
            "subject": int(kind[i] == 0),
            "wanted": int(conditions[condition[i]] == question["wanted"]),
            "both": int(kind[i] == 0 and conditions[condition[i]] == question["wanted"]),
            "likeness": round(likeness[i].item(), 6),
            "nearest": round(near[i].max().item(), 6),
            "nearest_photo": int(near[i].argmax()),
            "copy": int(near[i].max().item() > limit),
        }
        for i in range(n)
    ]


# -------------------------------------------------------------------------------------- 4. time and memory


def times(cell: dict, folder: Path) -> dict:
    """Where the cell's time went, in seconds, and what it took; of a run that was stopped, all its parts."""
    attempts = read_lines(folder / "attempts.jsonl")
    log = [entry for entry in read_lines(folder / "run" / "log.jsonl") if "seconds" in entry]
    drawn = read_lines(folder / cell["pictures"] / "times.jsonl")
    classes = folder / "run" / "class.json"
    told = read_json(classes) if classes.exists() else {"seconds": 0.0}
    class_seconds, seconds = told["seconds"], log[-1]["seconds"] if log else 0.0
    found = class_seconds - told.get("of_this_run", class_seconds)  # drawn for a training before
    wall = max(sum(a["seconds"] for a in attempts) + found, class_seconds + seconds)
    made = artefact(cell, folder / "run")
    files = [f for f in ([made] if made.is_file() else made.rglob("*")) if f.is_file()]
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
        "threads": attempts[-1].get("threads") if attempts else None,
    }


def validation_curve(folder: Path) -> list[list]:
    """[[step, loss of the held-out photos], ...] along the training."""
    log = read_lines(folder / "run" / "log.jsonl")
    return [[entry["step"], entry["held_out"]] for entry in log if "held_out" in entry]
