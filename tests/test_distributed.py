"""Two processes against one: loss, gradients, weights, and who writes what.

This file is also what the processes run (`torchrun --nproc_per_node=2 tests/test_distributed.py FOLDER`): the
four scripts through their main([...]), then the chores on the toy of test_trainer. Each leaves what it saw in
FOLDER, as NAME-RANK.pt. Last comes a training in which torchrun is stopped.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_trainer import apart, half_loss, rows, squares, toy

import train_lora
from hanokdiff import device
from hanokdiff.device import choose_device
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.training import distributed
from hanokdiff.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
METHODS = {  # few pictures, uneven where a process has several micro-batches
    "ti": "--batch-size 4".split(),
    "dreambooth": "--batch-size 4 --class-images 3 --lr 0.1 --text-lr 0.1 --word-lr 0.1".split(),
    "lora": "--batch-size 5 --micro-batch 2 --text-rank 2 --class-images 3 --preview-every 3".split()
    + ["--save-every", "2"],
    "hypernet": "--batch-size 4 --held-out 2 --class-images 0".split(),
}
STOPPED = (
    "--steps 30 --images 4 --batch-size 2 --class-images 0 --preview-every 0 --device cpu --out stopped-run"
)
COMMON = "--steps 3 --images 5 --lr 1 --preview-every 0 --save-every 0 --device cpu".split()


# -------------------------------------------------------------------------------------- what the processes do


class Plain(Trainer):
    """With SGD instead of AdamW, whose first steps are signs: a gradient of 1e-9 would be a whole step."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.optimizer = torch.optim.SGD(self.optimizer.param_groups, self.lr, fused=True)
        self.optimizer.register_step_pre_hook(self.keep)

    def keep(self, *_):
        if self.step == 0:
            named = list(zip(self.trainable, self.masters, strict=True))
            Plain.kept = {
                "loss": self.step_loss.item(),
                "gradients": {k: m.grad.clone() for k, m in named},
                "start": {k: m.detach().clone() for k, m in named},
                "run": self,
            }


def method(name: str) -> dict:
    """A script's whole main; the loss and the gradients of its first step, the weights that it ends with."""
    script, draw = importlib.import_module(f"train_{name}"), StableDiffusion.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "Trainer", Plain)
        patch.setattr(StableDiffusion, "draw", lambda *args, **more: draw(*args, **{"steps": 2, **more}))
        assert script.main([*COMMON, *METHODS[name]]) == 0
    run = Plain.kept.pop("run")
    return Plain.kept | {"weights": {k: m.detach() for k, m in zip(run.trainable, run.masters, strict=True)}}


def last_slot(when):
    """The toy's losses, but where `when(step)` holds the last slot's is not a number: in one process only."""

    def losses(batch, trainable):
        bad = torch.tensor([slot == batch.size - 1 and when(batch.step) for slot in batch.indices])
        return squares(batch, trainable).where(~bad, torch.nan)

    return losses


def stop(batch, trainable):
    """Ctrl-C reaches one process only, and not the one that writes (unless it is alone)."""
    if batch.step == 7 and batch.indices.stop == batch.size:
        os.kill(os.getpid(), signal.SIGINT)
    return squares(batch, trainable)


def chores() -> dict:
    """The toy, disturbed in every way: {name: what was learnt, or how it ended}."""
    drawn, steps, seen = [], [], {}

    def preview():
        drawn.append(distributed.RANK)
        return Image.new("RGB", (8, 8))

    def for_a_while(step):
        steps.append(step)
        return step >= 13 and len(steps) <= 20

    seen["whole"] = toy(
        Path("whole"), batch_size=5, micro_batch=2, preview=preview, preview_every=20, validate=lambda: 0.5
    )
    with pytest.raises(SystemExit) as e:
        toy(Path("stopped"), batch_size=5, micro_batch=2, losses=stop)
    # the first process may still hold the lock when the second looks
    left = [p.name for p in Path("stopped").iterdir() if distributed.RANK == 0 or p.name != "lock.json"]
    seen["code"], seen["left"] = e.value.code, sorted(left)
    seen["resumed"] = toy(Path("stopped"), batch_size=5, micro_batch=2, resume=True)
    seen["half"] = toy(Path("half"), losses=half_loss, dtype=torch.bfloat16, steps=5)
    seen["skipped"] = toy(Path("skipped"), losses=last_slot(lambda step: step == 5))
    seen["back"] = toy(Path("back"), steps=40, save_every=5, losses=last_slot(for_a_while))
    with pytest.raises(ValueError, match="no longer finite at step 20; the last good state is in"):
        toy(Path("diverged"), steps=60, save_every=5, losses=last_slot(lambda step: step >= 13))
    return seen | {"drawn": drawn}


def everything(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    for name in METHODS:
        torch.save(method(name), f"{name}-{distributed.RANK}.pt")
    torch.save(chores(), f"chores-{distributed.RANK}.pt")


if __name__ == "__main__":
    everything(Path(sys.argv[1]))
    while not Path("go").exists():
        time.sleep(0.05)
    sys.exit(train_lora.main(STOPPED.split()))


# ----------------------------------------------------------------------------------------------- what is held


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same in one process and in two; torchrun is stopped in the training that comes after."""
    home, here, threads = tmp_path_factory.mktemp("several"), os.getcwd(), torch.get_num_threads()
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (home / "two").mkdir()
    two = subprocess.Popen([*command, __file__, home / "two"], **pipes, env=env)
    torch.set_num_threads(1)  # the class pictures must be the same
    everything(home / "one")
    os.chdir(here)
    torch.set_num_threads(threads)
    (home / "two/go").touch()
    start, log = time.monotonic(), home / "two/stopped-run/log.jsonl"
    while two.poll() is None and not log.exists() and time.monotonic() - start < 300:
        time.sleep(0.02)
    two.send_signal(signal.SIGINT)
    said = two.communicate(timeout=100)[0]
    assert two.returncode and log.exists(), said
    (home / "said").write_text(said)
    return home


def three(folders: Path, name: str) -> list[dict]:
    """What a single process saw, and the first and the second of two."""
    return [torch.load(folders / f) for f in (f"one/{name}-0.pt", f"two/{name}-0.pt", f"two/{name}-1.pt")]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_learn_what_one_learns(folders, name):
    one, first, second = three(folders, name)
    assert first["loss"] == second["loss"] == pytest.approx(one["loss"], abs=1e-6)
    zero = {k: torch.zeros_like(t) for k, t in one["start"].items()}
    for what, origin in (("start", one["start"]), ("gradients", zero), ("weights", one["start"])):
        assert apart(first[what], second[what]) == 0
        far, near = apart(one[what], origin), apart(one[what], first[what])
        print(f"{name}: {what} {far:.1e}, differ by {near:.1e}")
        assert near <= 1e-5 and (near <= far / 1000 > 0 or what == "start")


@pytest.mark.parametrize("name", METHODS)
def test_the_folder_is_as_one_process_leaves_it(folders, name):
    one, two = (
        {str(p.relative_to(folders / n)): p for p in (folders / n / "runs" / name).rglob("*") if p.is_file()}
        for n in ("one", "two")
    )
    assert one.keys() == two.keys() and len(one) > 2
    logs = [[json.loads(r) for r in f[f"runs/{name}/log.jsonl"].read_text().splitlines()] for f in (one, two)]
    assert [[r["step"] for r in log if "loss" in r] for log in logs] == [[3], [3]]
    assert [r["held_out"] for r in logs[0][:-1] if "held_out" in r] == pytest.approx(
        [r["held_out"] for r in logs[1][:-1] if "held_out" in r], abs=1e-5
    )
    saved = [f for f in one if f.endswith(".safetensors")]
    assert all(apart(load_file(one[f]), load_file(two[f])) <= 1e-5 for f in saved)
    runs = list((folders / "two/runs").iterdir())
    assert not list(folders.rglob("*.part")) and len(runs) == len(METHODS) + 1


def test_one_speaks(folders):
    said = (folders / "said").read_text()
    assert said.count("class: 3 pictures") == 2  # DreamBooth's and LoRA's
    for name in METHODS:
        assert said.count(f"wrote runs/{name}/") == 1, said
    assert said.count("steps of 4 in 2 processes at learning rate") == 3


def test_the_chores_are_done_once_and_by_the_first(folders):
    one, first, second = three(folders, "chores")
    for name in ("whole", "resumed", "half", "skipped", "back"):
        assert apart(first[name], second[name]) == 0
        assert apart(one[name], first[name]) <= (4e-3 if name == "half" else 2e-6), name  # bf16 has 8 bits
    assert first["drawn"] == [0, 0] and second["drawn"] == []
    for name in ("whole", "stopped", "half", "skipped", "back", "diverged"):
        logs = [rows(folders / n / name) for n in ("one", "two")]
        assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]] and len(logs[0]) > 0
        near = 1e-2 if name == "half" else 1e-4
        for a, b in zip(*logs):
            assert a.keys() == b.keys() and a.get("skipped") == b.get("skipped")
            assert (a.get("loss") or 0) == pytest.approx(b.get("loss") or 0, rel=near)


def test_a_stop_is_a_stop_of_all(folders):
    """After the same step, wherever the signal came; and going on is exact, to the bit."""
    _, *both = three(folders, "chores")
    for seen in both:
        # of step 8: not yet in the log
        assert seen["code"] == 130 and seen["left"] == ["config.json", "state"]
        assert apart(seen["resumed"], seen["whole"]) == 0
    assert rows(folders / "two/stopped") == [r for r in rows(folders / "two/whole") if "held_out" not in r]


def test_what_is_not_finite_in_one_is_so_for_all(folders):
    assert [r["skipped"] for r in rows(folders / "two/skipped")] == [1, 0, 0]
    log = rows(folders / "two/back")
    assert [r["step"] for r in log] == [10, 20, 30, 40] and not any(r["skipped"] for r in log)
    assert [r["lr"] for r in log][:2] == pytest.approx([0.05, 0.025])
    files = sorted(p.name for p in (folders / "two/diverged").iterdir())
    assert files == ["config.json", "log.jsonl", "state", "toy-000005.safetensors", "toy-000010.safetensors"]


def test_torchrun_is_stopped_and_one_goes_on(folders, monkeypatch, capsys):
    """As a user has it: Ctrl-C to torchrun, which passes it on; then --resume, in any number of processes."""
    said, out = (folders / "said").read_text(), folders / "two/stopped-run"
    assert said.count("with --resume stopped-run") == 1 and list((out / "state").glob("*.pt")), said
    monkeypatch.chdir(folders / "two")
    assert train_lora.main(["--resume", "stopped-run", "--device", "cpu"]) == 0
    assert "going on from step" in capsys.readouterr().out
    assert [r["step"] for r in rows(out)] == [10, 20, 30] and (out / "lora.safetensors").exists()


# ------------------------------------------------------------------------------------------------ without any


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_slot_has_one_process(monkeypatch, count):
    monkeypatch.setattr(distributed, "WORLD_SIZE", count)
    indices = []
    for rank in range(count):
        monkeypatch.setattr(distributed, "RANK", rank)
        indices += distributed.shard(7)
    assert indices == list(range(7))
    if count > 2:
        with pytest.raises(ValueError, match=f"--batch-size 2 is too small for {count} processes"):
            distributed.shard(2)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    """The error of a machine without one says which it would have been."""
    monkeypatch.setattr(device, "WORLD_SIZE", 2)
    monkeypatch.setattr(device, "LOCAL_RANK", 99)
    with pytest.raises(ValueError, match='device "cuda:99" cannot be used'):
        choose_device("cuda")
    assert choose_device("cpu")[0] == torch.device("cpu")


def test_buckets_keep_the_order_and_the_dtype(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET_NUMBERS", 10)
    sizes = [4, 4, 4, 20, 1, 1]
    tensors = [torch.zeros(n, dtype=torch.bfloat16 if i == 5 else torch.float32) for i, n in enumerate(sizes)]
    assert [[t.numel() for t in b] for b in distributed.buckets(tensors)] == [[4, 4], [4], [20], [1], [1]]
