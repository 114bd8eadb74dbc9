"""Full disks, folders of others, and a kill at the worst moment, for everything that writes a file."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import clipscore
import train_dreambooth
from hanokdiff import caption
from hanokdiff.chart import Page
from hanokdiff.compare import report
from hanokdiff.errors import one_line
from hanokdiff.files import replacing, write_json, write_text
from hanokdiff.formats import embedding_file, hypernet_file, lora_file, single_file
from hanokdiff.formats.folder import save_folder
from hanokdiff.formats.load import load_model
from hanokdiff.formats.tensors import write_pt, write_tensors
from hanokdiff.formats.tokenizer import save_tokenizer
from hanokdiff.methods import hypernetwork

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork and limits of Unix")


@pytest.fixture(scope="module")
def sd():
    return load_model("tiny", "cpu", log=None)


def low_rank(value):
    tensors = {"down": torch.full((2, 500), value), "up": torch.ones(500, 2)}
    return {"lora_unet_mid_block_attentions_0_proj_in": tensors}


def picture(path, value):
    with replacing(path) as aside:
        Image.effect_noise((200, 200), 50 + value).save(aside, "png")


def net(value):
    spec = hypernetwork.HypernetConfig()
    tensors = hypernetwork.ResidualMLP(16, spec).state_dict()
    return spec, {16: [{k: t + value for k, t in tensors.items()}] * 2}


WRITERS = {
    "json": ("a.json", lambda sd, p, v: write_json(p, {"a": [v] * 5000})),
    "tensors": ("a.safetensors", lambda sd, p, v: write_tensors({"a": torch.full((5000,), v)}, p)),
    "pt": ("a.pt", lambda sd, p, v: write_pt({"a": torch.full((5000,), v)}, p)),
    "embedding": ("a.safetensors", lambda sd, p, v: embedding_file.save_file(p, "*", torch.full((4, 2000),
        v))),
    "WebUI embedding": ("a.pt", lambda sd, p, v: embedding_file.save_file(p, "*", torch.full((4, 2000), v))),
    "LoRA": ("a.safetensors", lambda sd, p, v: lora_file.save_file(p, low_rank(v), {})),
    "diffusers LoRA": ("a.safetensors", lambda sd, p, v: lora_file.save_diffusers_file(p, low_rank(v), {})),
    "hypernetwork": ("a.pt", lambda sd, p, v: hypernet_file.save_file(p, *net(v))),
    "single file": ("a.safetensors", lambda sd, p, v: single_file.save_file(
        p, sd.unet, sd.vae, sd.text.encoder, sd.schedule, torch.float32 if v else torch.float16)),
    "caption": ("a.txt", lambda sd, p, v: caption.write(p, f"{v} " * 5000)),
    "scores": ("a.csv", lambda sd, p, v: write_text(p, clipscore.as_csv([{"a": v}] * 5000))),
    "chart": ("a.svg", lambda sd, p, v: Page("").figure("", p, f"{v} ".encode() * 5000, "")),
    "picture": ("a.png", lambda sd, p, v: picture(p, v)),
}  # fmt: skip


def in_child(work) -> str:
    """What report_errors would print of work in a child process; "killed" if it was; "" if all went well."""
    receive, send = os.pipe()
    if not (pid := os.fork()):
        try:
            # the parent's threads are not in the child, where OpenMP would wait for them
            torch.set_num_threads(1)
            work()
        except (ValueError, OSError) as e:
            os.write(send, one_line(e).encode())
        except BaseException as e:
            os.write(send, f"traceback: {e!r}".encode())
        finally:
            os._exit(0)
    os.close(send)
    with open(receive, "rb") as f:
        said = f.read().decode()
    return "killed" if os.waitpid(pid, 0)[1] == signal.SIGKILL else said


def full_disk():
    import resource  # not on Windows

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def someone_else():
    if os.geteuid() == 0:
        os.setuid(65534)


@pytest.mark.parametrize("what", WRITERS)
def test_the_old_file_stays_whole(sd, tmp_path, what):
    name, write = WRITERS[what]
    path, folder = tmp_path / name, tmp_path
    write(sd, path, 0.0)
    before = path.read_bytes()

    def kept(files):
        return path.read_bytes() == before and sorted(p.name for p in folder.iterdir()) == sorted(files)

    said = in_child(lambda: (full_disk(), write(sd, path, 1.0)))
    assert said.startswith(f"{path} cannot be written (") and "unchanged" in said and kept([name]), said

    folder.chmod(0o555)
    said = in_child(lambda: (someone_else(), write(sd, path, 1.0)))
    folder.chmod(0o755)
    assert str(folder) in said and "Permission denied" in said and "\n" not in said and kept([name]), said

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def dies():
        os.replace = kill
        write(sd, path, 1.0)

    assert in_child(dies) == "killed" and kept([name, name + ".part"])
    write(sd, path, 1.0)  # what the kill left behind is in nobody's way
    assert path.read_bytes() != before and [p.name for p in folder.iterdir()] == [name]


def test_a_model_folder(sd, tmp_path):
    """Of many files each is whole: the old one or the new one."""

    def write(dtype):
        parts = sd.unet, sd.vae, sd.text.encoder, sd.text.tokenizer, sd.schedule
        save_folder(tmp_path / "model", *parts, dtype)

    def held():
        return {f.relative_to(tmp_path): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}

    def no_space_for_the_tokenizer():
        full_disk()
        save_tokenizer(sd.text.tokenizer, tmp_path / "model" / "tokenizer")

    write(torch.float32)
    before = held()
    for work in (lambda: (full_disk(), write(torch.float16)), no_space_for_the_tokenizer):
        said = in_child(work)
        assert "cannot be written" in said and str(tmp_path) in said and held() == before, said
    assert load_model(str(tmp_path / "model"), "cpu", log=None).schedule == sd.schedule


def test_a_numbered_model_folder(sd, tmp_path):
    """Written again, as by a resumed run, and killed while the former one is deleted: whole."""
    path, rmtree = tmp_path / "model-000100", shutil.rmtree
    train_dreambooth.save_model(path, sd, "*", None, [])

    def dies(folder, **how):
        if (Path(folder) / "unet").exists():  # not one of the tokenizer
            (Path(folder) / "unet" / "config.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def written_again():
        shutil.rmtree = dies
        train_dreambooth.save_model(path, sd, "sks", None, [])

    assert in_child(written_again) == "killed" and load_model(str(path), "cpu", log=None).digest == sd.digest
    rmtree(tmp_path / "model-000100.part", ignore_errors=True)
    train_dreambooth.save_model(path, sd, "sks", None, [])
    assert [f.name for f in tmp_path.iterdir()] == [path.name]


def test_the_report(tmp_path, monkeypatch):
    """Its four files, each whole or not there."""
    monkeypatch.setattr(report, "summarise", lambda results: {})
    page = type("Page", (), {"markdown": lambda self: "m" * 5000, "html": lambda self: "h" * 5000})
    monkeypatch.setattr(report, "compose", lambda *_: page())
    said = in_child(lambda: (full_disk(), report.write(tmp_path, {"settings": ["x" * 5000]}, [])))
    assert said.startswith(f"{tmp_path / 'results.json'} cannot be written"), said
    assert not list(tmp_path.iterdir())
