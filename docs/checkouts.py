"""Two checkouts side by side: what has a change changed that should change nothing? (docs/LOG.md, section 14)

python docs/checkouts.py same OLD NEW       the same commands in both; every file that differs
python docs/checkouts.py speed OLD NEW      steps of training and sampling in turns; the new time over the old
python docs/checkouts.py speed OLD NEW --works sample --sizes small --rounds 24

One thread each, as a second core's help varies. `git worktree add ../old COMMIT` makes a checkout.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

TRAINING = (
    "--images 4 --steps 8 --batch-size 3 --save-every 4 --preview-every 8 --device cpu --held-out 3 --seed 3"
)
TRAININGS = [
    "train_ti.py --vectors 3 --hold-norm --out ti",
    "train_ti.py --micro-batch 2 --flip --token sks --out ti2",
    "train_lora.py --text-rank 2 --flip --micro-batch 2 --out lora",
    "train_lora.py --rank 3 --alpha 2 --targets attention --min-snr 0 --out lora2",
    "train_hypernet.py --dropout 0.3 --layer-norm --out hyper",
    "train_hypernet.py --widths context --activation relu --out hyper2",
    "train_dreambooth.py --class-images 5 --out db",
    "train_dreambooth.py --class-images 0 --freeze-text --dtype bf16 --out db2",
    "train_dreambooth.py --class-images 0 --train cross-attention --out db3",
]
SAMPLING = "--device cpu --seed 5 --steps 9"
SAMPLERS = ("ddim", "euler", "euler_karras", "euler_a", "euler_a_karras", "dpmpp_2m", "dpmpp_2m_karras")
SAMPLES = [
    ["a castle in the snow", "a barn, (fire:1.3)", *"--n 2 --grid --out s1".split()],
    *(["a tower at night", *f"--sampler {s} --n 2 --negative snow --out s-{s}".split()] for s in SAMPLERS),
    ["*, fire", "* in the fire BREAK a house",
     *"--lora lora/lora.safetensors:0.7 --hypernet hyper/hypernet.pt:0.5 --out s2".split()],
    ["*, fire", *"--embedding ti/embedding.safetensors --cfg 1 --clip-skip 2 --out s3".split()],
    ["* at night", *"--model db/model --size 80x64 --out s4".split()],
    ["a tent", *"--init-image s1/00000-5.png --strength 0.6 --n 3 --batch-size 2 --out s5".split()],
]  # fmt: skip
OTHERS = [
    "clipscore.py s1 --json c1.json --csv c1.csv",
    "-m hanokdiff.convert lora/lora.safetensors diffusers.safetensors --to diffusers",
    "-m hanokdiff.convert ti/embedding.safetensors ti.pt",
    "-m hanokdiff.convert db/model db.safetensors",
]


def run(checkout: Path, arguments: list[str], folder: Path) -> None:
    """One command of a checkout, in `folder`."""
    if arguments[0].endswith(".py"):
        arguments = [str(checkout / arguments[0]), *arguments[1:]]
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(arguments)}: {done.stderr[-500:]}")


def flat(content, name: str = "") -> dict:
    """A nested table as one, by dotted names."""
    if isinstance(content, dict | list | tuple):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        return {k: v for key, value in pairs for k, v in flat(value, f"{name}.{key}").items()}
    return {name: content}


def read(path: Path):
    """What is compared of a file: tensors and metadata, pixels and text, or lines without the seconds."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as f:
            hashes = {k: v for k, v in (f.metadata() or {}).items() if not k.startswith("sshs_")}
            return {name: f.get_tensor(name) for name in f.keys()} | hashes  # noqa: SIM118
    if path.suffix == ".pt":
        return flat(torch.load(path, weights_only=True))
    if path.suffix == ".png":
        picture = Image.open(path)
        return {"pixels": torch.from_numpy(np.array(picture).astype(np.int32)), **picture.info}
    lines = path.read_text().splitlines()
    if path.name == "log.jsonl":
        lines = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    return flat(lines) if path.name not in ("class.json", "index.html", "log.csv") else {}


def difference(a: dict, b: dict) -> str:
    """ "" if equal, else the largest difference of a number, or the name of what else differs."""
    if a.keys() != b.keys():
        return f"only in one: {sorted(a.keys() ^ b.keys())[:3]}"
    numbers = [k for k in a if isinstance(a[k], torch.Tensor)]
    other = [k for k in a if k not in numbers and a[k] != b[k]]
    changes = [(a[k].double() - b[k].double()).abs() for k in numbers if a[k].numel()]
    largest = max((change.max().item() for change in changes), default=0.0)
    return f"{largest:.2g}" * (largest > 0) + " " * bool(other) + ", ".join(other[:3])


def same(old: Path, new: Path) -> None:
    with tempfile.TemporaryDirectory() as home:
        folders = [Path(home, side) for side in ("old", "new")]
        commands = [[*c.split(), *TRAINING.split()] for c in TRAININGS]
        commands += [["sample.py", *SAMPLING.split(), *c] for c in SAMPLES] + [c.split() for c in OTHERS]
        for checkout, folder in zip((old, new), folders, strict=True):
            folder.mkdir()
            for command in commands:
                run(checkout, command, folder)
        names = [sorted(str(f.relative_to(x)) for x in [folder] for f in x.rglob("*.*") if f.is_file())
                 for folder in folders]  # fmt: skip
        assert names[0] == names[1], f"other files: {sorted(set(names[0]) ^ set(names[1]))}"
        for name in names[0]:
            if apart := difference(*(read(folder / name) for folder in folders)):
                print(f"{name}: {apart}")
        print(f"{len(commands)} commands, {len(names[0])} files compared")


def speed(old: Path, new: Path, works: list[str], sizes: list[str], rounds: int) -> None:
    """Both in turns, each in a process of its own that has made everything ready."""
    print("work, size: new / old of the fastest step, and the median of the pairs; processor time")
    for work, size in ((w, s) for s in sizes for w in works):
        sides = {}
        for checkout in (old, new):
            command = [sys.executable, "-c", STEPS, str(checkout), work, size]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout)
            sides[checkout] = subprocess.Popen(command, **pipes, env={**os.environ, **ENVIRONMENT})
        seconds: dict[Path, list[float]] = {old: [], new: []}
        for turn in range(rounds):
            for checkout in (old, new) if turn % 2 else (new, old):
                print(file=sides[checkout].stdin, flush=True)
                seconds[checkout].append(float(sides[checkout].stdout.readline()))
        for process in sides.values():
            process.stdin.close()
            process.wait()
        pairs = [b / a for a, b in zip(seconds[old], seconds[new], strict=True)]
        fastest = min(seconds[new]) / min(seconds[old])
        print(f"{work}, {size}: {fastest:.3f}; {statistics.median(pairs):.3f}, {rounds} pairs", flush=True)


ENVIRONMENT = {  # glibc keeps freed memory, as our commands ask it to (hanokdiff/device.py)
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
}
STEPS = """
import sys, time
checkout, work, size = sys.argv[1:]
sys.path.insert(0, checkout)
import torch
try:
    from hanokdiff.bench import setup
    from hanokdiff.training.noise import Batch
except ImportError:  # before the second house
    import hanokdiff.bench as setup
    from hanokdiff.run import Batch
sd = setup.build(size, "cpu", torch.float32)
if work == "sample":
    def step(k):
        for _ in sd.sample(["a barn on fire"] * 4, range(4), steps=4):
            pass
else:
    trainable, losses = setup.prepare(sd, work, setup.side(size))
    optimizer = torch.optim.AdamW(list(trainable.values()), fused=True)
    def step(k):
        losses(Batch(0, k, range(8), 8)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
for k in range(3):
    step(k)
for _ in sys.stdin:  # a line: six steps, the fastest of which is told
    seconds = []
    for k in range(6):
        start = time.process_time()
        step(k)
        seconds.append(time.process_time() - start)
    print(min(seconds), flush=True)
"""


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("same", "speed"))
    p.add_argument("checkouts", nargs=2, type=lambda text: Path(text).resolve(), metavar="CHECKOUT")
    p.add_argument("--works", nargs="+", default=["ti", "dreambooth", "lora", "sample"])
    p.add_argument("--sizes", nargs="+", default=["tiny"])
    p.add_argument("--rounds", type=int, default=12)
    args = p.parse_args()
    if args.what == "same":
        same(*args.checkouts)
    else:
        speed(*args.checkouts, args.works, args.sizes, max(2, args.rounds))
