"""Trainings side by side: one worker process for each core or GPU, each with one training at a time.

A step of a small model hardly gains from a second core, so two trainings of one thread each are faster than
one after another of two. Every cell does only what is missing: whatever is stopped here goes on at the next
start.

    parent -> worker    the command's arguments, then the number of a training, a line each
    worker -> parent    {"done": number}, {"error": text} or {"stopped": true}, a line each
"""

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from hanokdiff.compare import plan, run

BASE_BYTES = 700 << 20  # of a process with torch in it
COPIES = 6  # of the weights at most: weights, gradients, two moments, and activations as large again


def trainings(cells: list[dict]) -> list[list[dict]]:
    """The cells that share a training, one list for each."""
    by_folder: dict[str, list[dict]] = {}
    for cell in cells:
        by_folder.setdefault(cell["folder"], []).append(cell)
    return list(by_folder.values())


def longest_first(groups: list[list[dict]], todo: list[int]) -> list[int]:
    """Set after set, and in each, behind the untouched model, what trains on most pictures first: the last
    one runs alone."""

    def order(i: int) -> tuple:
        cell = groups[i][0]
        pictures = cell["steps"] * cell["batch_size"] * (2 if cell["class_images"] else 1)
        return seeds.index(cell["seed"]), pictures > 0, -pictures

    seeds = list(dict.fromkeys(group[0]["seed"] for group in groups))
    return sorted(todo, key=order)


def do(context: plan.Context, out: Path, drawing: dict, cells: list[dict]) -> None:
    """Train, draw and score what is missing of the cells of one training."""
    for cell in cells:
        folder = out / cell["folder"]
        run.train(cell, folder)
        run.draw(context, cell, folder, drawing)
        run.score_images(context, cell, folder)


def usual_jobs(sd, device: str | None) -> int:
    """As many as there are GPUs, or cores that have memory for a training each."""
    if device is None and torch.cuda.is_available():
        return torch.cuda.device_count()
    if sd.device.type != "cpu":
        return 1
    weights = sum(p.numel() for net in (sd.unet, sd.vae, sd.text.encoder) for p in net.parameters()) * 4
    with suppress(ValueError, OSError, AttributeError):  # where the system says what is free
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return max(1, min(cores(), free // (BASE_BYTES + COPIES * weights)))
    return 1


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(argv: list[str], todo: list[int], jobs: int) -> Iterator[int]:
    """Do these trainings, `jobs` at once; yields the number of each that is finished. Ctrl-C and a failure
    stop the others, which keep their states."""
    answers: queue.Queue = queue.Queue()
    waiting = iter(todo)
    workers = [start(k, jobs) for k in range(min(jobs, len(todo)))]
    try:
        for worker in workers:
            threading.Thread(target=listen, args=(worker, answers), daemon=True).start()
            send(worker, json.dumps(argv))
        busy = sum(send_next(worker, waiting) for worker in workers)
        while busy:
            worker, answer = answers.get()
            if "done" not in answer:
                if answer.get("stopped"):
                    raise KeyboardInterrupt
                raise ValueError(
                    answer.get("error", "a worker ended without a word; the same command goes on")
                )
            yield answer["done"]
            busy += send_next(worker, waiting) - 1
    except BaseException:
        for worker in workers:
            worker.send_signal(signal.SIGINT)
        raise
    finally:
        for worker in workers:
            with suppress(OSError):
                worker.stdin.close()  # an idle one ends
            worker.wait()


def start(k: int, jobs: int) -> subprocess.Popen:
    """The k-th of so many workers, with its share of the cores. It ends when this process does."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(plan.SCRIPTS), *sys.path])}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = visible if visible != [""] else [str(i) for i in range(torch.cuda.device_count())]
        env["CUDA_VISIBLE_DEVICES"] = gpus[k % len(gpus)]
    else:
        env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(max(1, cores() // jobs))
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return subprocess.Popen(
        [sys.executable, "-m", "hanokdiff.compare.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
        encoding="utf-8",
        start_new_session=True,  # the terminal's Ctrl-C reaches the parent, which passes it on
        preexec_fn=libc and (lambda: libc.prctl(1, signal.SIGKILL)),
    )


def send(worker: subprocess.Popen, line: str) -> None:
    with suppress(OSError):  # it has ended: `listen` says so
        worker.stdin.write(line + "\n")
        worker.stdin.flush()


def send_next(worker: subprocess.Popen, waiting: Iterator[int]) -> int:
    """Give it another training, if there is one; 1 if so."""
    number = next(waiting, None)
    if number is None:
        return 0
    send(worker, str(number))
    return 1


def listen(worker: subprocess.Popen, answers: queue.Queue) -> None:
    for line in worker.stdout:
        answers.put((worker, json.loads(line)))
    answers.put(
        (worker, {"error": "a worker ended without a word (out of memory?); the same command goes on"})
    )
