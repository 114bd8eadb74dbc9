"""The scripts through their main([...]): odd photos in, a LoRA out, pictures drawn with it; bad input."""

import contextlib
import hashlib
import importlib
import io
import json
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train_lora
import train_ti
from hanokdiff.errors import report_errors
from hanokdiff.formats import lora_file
from hanokdiff.formats.load import load_model
from hanokdiff.methods import lora
from hanokdiff.tiny import world

pytestmark = pytest.mark.usefixtures("quick", "elsewhere")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Six photos, each odd in its own way, one that is broken, and captions for two."""
    folder = tmp_path_factory.mktemp("odd") / "photos"
    folder.mkdir()
    images = [image for image, _ in world.photos(6)]
    exif = Image.Exif()
    exif[0x0112] = 6
    images[0].save(folder / "turned.jpg", exif=exif)
    images[1].putalpha(Image.linear_gradient("L").resize((64, 64)))
    images[1].save(folder / "transparent.png")
    images[2].quantize(16).save(folder / "palette.png")
    images[3].convert("L").save(folder / "grey.png")
    images[4].resize((64, 400)).save(folder / "tall.webp")
    images[5].save(folder / "whole.png")
    (folder / "broken.png").write_bytes((folder / "whole.png").read_bytes()[:-900])
    (folder / "turned.txt").write_text("A building with a roof in the snow\n")
    (folder / "한옥.txt").write_text("of no photo")
    (folder / "grey.txt").write_text("\ufeffa building with a roof, 밤", encoding="utf-8")
    return folder


def arguments(sd1, photos, *more) -> list[str]:
    how = "--steps 3 --batch-size 2 --rank 2 --lr 0.05 --resolution 32 --device cpu"
    return ["--model", str(sd1.folder), "--data", str(photos), *how.split(), *map(str, more)]


def hashes(sd) -> dict[str, str]:
    """Of every tensor of the base, by its name without LoRAs."""
    parts = {"unet": sd.unet, "vae": sd.vae, "text": sd.text.encoder}
    tensors = {f"{name}.{k}": t for name, part in parts.items() for k, t in part.state_dict().items()}
    tensors = {k: t for k, t in tensors.items() if not k.endswith((".down", ".up", ".vectors"))}
    return {
        k.replace(".base.", "."): hashlib.sha256(t.numpy().tobytes()).hexdigest() for k, t in tensors.items()
    }


@pytest.fixture(scope="module")
def plain(sd1, photos, tmp_path_factory):
    """A folder with runs/lora, a run that nothing disturbed, and what it printed."""
    home = tmp_path_factory.mktemp("plain")
    with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()) as said:
        assert train_lora.main(arguments(sd1, photos)) == 0
    return home, said.getvalue()


def stop(monkeypatch, *argv) -> None:
    """The run of these options, with Ctrl-C after its second step."""
    update = train_lora.Trainer.backward

    def stopping(run, losses):
        update(run, losses)
        run.interrupted = run.step == 1

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(train_lora.Trainer, "backward", stopping)
        train_lora.main(list(argv))
    assert e.value.code == 130


def same_file(a: Path, b: Path) -> bool:
    one, two = (load_file(run / "lora.safetensors") for run in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[k], t) for k, t in two.items())


@pytest.fixture(scope="module")
def trained(sd1, photos, tmp_path_factory):
    """One run of train_lora, and what it saw: the base's hashes before and after."""
    out, seen, load = tmp_path_factory.mktemp("run") / "한옥 lora", {}, load_model

    def spy(*args, **kwargs):
        seen["sd"] = load(*args, **kwargs)
        seen["before"] = hashes(seen["sd"])
        return seen["sd"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lora, "load_model", spy)
        more = ("--text-rank", 2, "--preview-every", 2, "--save-every", 2, "--flip", "--micro-batch", 1)
        assert train_lora.main(arguments(sd1, photos, "--out", out, *more)) == 0
    return out, seen["before"], hashes(seen["sd"])


def draw(sd1, out, *more, prompts=("*, fire",)) -> list[np.ndarray]:
    """sample.py -> its pictures, in the order of their names."""
    argv = ["--model", str(sd1.folder), "--steps", "3", "--device", "cpu", "--out", str(out), *map(str, more)]
    assert sample.main([*prompts, *argv]) == 0
    return [np.asarray(Image.open(p)).astype(int) for p in sorted(out.glob("0*.png"))]


def test_train_lora(plain):
    """What is said before, and what appears; the odd photos are all used, the broken one is named."""
    said, out = plain[1], plain[0] / "runs" / "lora"
    for words in (
        "model ", "UNet of", "device cpu (named), fp32", "trains 146 LoRAs of rank 2",
        "'broken.png' cannot be read", "6 photos from", "2 with captions", "1 unreadable",
        "rotated by EXIF ('turned.jpg')", "over white", "became '*' 2 times, in 2 of 2 captions",
        "4 of 6 photos have no caption: 'a photo of *'", "steps/s; wrote runs/lora/lora.safetensors",
    ):  # fmt: skip
        assert words in said, (words, said)
    names = "config.json index.html log.csv log.jsonl lora.safetensors previews"
    assert sorted(p.name for p in out.iterdir()) == names.split()
    config = json.loads((out / "config.json").read_text())
    assert config["images"] == 6 and config["token"] == "*" and config["alpha"] == 2 and config["lr"] == 0.05
    row = json.loads((out / "log.jsonl").read_text())
    assert row["step"] == 3 and np.isfinite(row["loss"]) and row["skipped"] == 0
    tensors = load_file(out / "lora.safetensors")
    # 18 in the text encoder; all have learnt but who asks whom, where a level has one position only
    ups = [t for k, t in tensors.items() if "lora_up" in k and ("attn2" in k or "to_v" in k)]
    assert len(tensors) == 3 * 146 and all(t.abs().max() > 0 for t in ups)
    metadata = lora_file.read_file(out / "lora.safetensors")[1]
    told = {"hanokdiff_token": "*", "ss_num_train_images": "6", "ss_steps": "3", "ss_resolution": "(32, 32)"}
    assert metadata.items() >= told.items()


def test_the_same_run_again_is_the_same_and_lands_beside(sd1, photos, plain, monkeypatch):
    monkeypatch.chdir(plain[0])
    assert train_lora.main(arguments(sd1, photos)) == 0
    assert same_file(Path("runs/lora"), Path("runs/lora-2"))


def test_the_base_stays_frozen_to_the_bit(trained):
    out, before, after = trained
    assert len(before) > 500 and before == after
    names = "config.json index.html log.csv log.jsonl lora-000002.safetensors lora.safetensors previews state"
    assert sorted(p.name for p in out.iterdir()) == names.split()
    assert sorted(p.name for p in (out / "previews").iterdir()) == ["000002.png", "000003.png"]
    assert shown_at(out / "previews" / "000003.png") == 32  # the side that it trains at


def test_pictures_depend_on_the_lora(sd1, trained, tmp_path, capsys):
    """And on its strength, the seed, the prompt; at strength 0 it is the base."""
    file = trained[0] / "lora.safetensors"
    plain = draw(sd1, tmp_path / "plain", "--token", "*")[0]
    capsys.readouterr()
    with_it = draw(sd1, tmp_path / "with", "--lora", file)[0]
    assert f"LoRA {file}: all 146 modules matched, strength 1" in capsys.readouterr().out
    others = {
        "plain": plain,
        "half": draw(sd1, tmp_path / "half", "--lora", f"{file}:0.5")[0],
        "twice": draw(sd1, tmp_path / "twice", "--lora", file, "--lora", file)[0],
        "seed": draw(sd1, tmp_path / "seed", "--lora", file, "--seed", 1)[0],
        "prompt": draw(sd1, tmp_path / "prompt", "--lora", file, prompts=["* at night"])[0],
        "negative": draw(sd1, tmp_path / "negative", "--lora", file, "--negative", "snow")[0],
        "word": draw(sd1, tmp_path / "word", "--lora", file, "--literal-tokens")[0],
    }
    for name, other in others.items():
        assert np.abs(other - with_it).max() > 5, name
    assert (draw(sd1, tmp_path / "zero", "--lora", f"{file}:0")[0] == plain).all()


def test_a_picture_is_its_seeds_alone(sd1, trained, tmp_path):
    """The same, within one grey level, in any batch and among any number; and the seeds are told apart."""
    file = trained[0] / "lora.safetensors"
    alone = draw(sd1, tmp_path / "alone", "--lora", file, "--seed", 2)[0]
    for n, at_once in ((3, 1), (5, 2)):
        drawn = draw(sd1, tmp_path / str(n), "--lora", file, "--n", n, "--batch-size", at_once)
        assert len(drawn) == n and np.abs(drawn[2] - alone).max() <= 1
        assert np.abs(drawn[1] - alone).max() > 5


def test_how_a_picture_was_made_is_in_it(sd1, trained, tmp_path, capsys):
    """The WebUI's text, numbered names that go on, a grid; the pseudo word comes from the LoRA."""
    file = trained[0] / "lora.safetensors"
    more = "--n 2 --seed 5 --size 48x64 --negative snow --sampler euler_a --cfg 3 --grid".split()
    draw(sd1, tmp_path / "a", "--lora", f"{file}:0.7", *more, prompts=["*, fire", "a barn"])
    captured = capsys.readouterr()
    assert 'the prompt "a barn" does not contain "*"' in captured.err
    assert "wrote 4 pictures to" in captured.out
    names = ["00000-5.png", "00001-6.png", "00002-5.png", "00003-6.png", "grid.png"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names
    picture = Image.open(tmp_path / "a" / "00001-6.png")
    assert picture.size == (48, 64) and picture.text["parameters"] == (
        f"*, fire\nNegative prompt: snow\nSteps: 3, Sampler: euler_a, CFG scale: 3, Seed: 6, Size: 48x64, "
        f"Model: {sd1.folder}, LoRA: lora.safetensors:0.7"
    )
    assert Image.open(tmp_path / "a" / "00002-5.png").text["parameters"].startswith("a barn\nNeg")
    draw(sd1, tmp_path / "a")
    assert (tmp_path / "a" / "00004-0.png").exists()


@pytest.mark.parametrize("command", ["train_lora.py", "sample.py", "clipscore.py", "-m hanokdiff.compare"])
def test_help(command, capsys):
    module = command.removesuffix(".py").replace("-m hanokdiff.compare", "hanokdiff.compare.__main__")
    with pytest.raises(SystemExit) as e:
        importlib.import_module(module).main(["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and f"python {command}" in out and out.count("\n  --") > 5
    assert all(len(line) < 130 for line in out.splitlines())


def test_help_tells_both_columns_of_defaults(capsys):
    with pytest.raises(SystemExit):
        train_lora.main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    for told in ("(default: tiny 0.002, SD 0.0001)", "rank of the change (default: tiny 16, SD 8)"):
        assert told in words


def test_stopped_and_resumed(sd1, photos, plain, tmp_path, capsys, monkeypatch):
    """Ctrl-C after the second step; --resume needs no other option."""
    stop(monkeypatch, *arguments(sd1, photos, "--out", "a"))
    assert "stopped at step 2 of 3; go on with --resume a" in capsys.readouterr().out
    before = listing(tmp_path / "a")
    for more in (("--lr", "0.1"), ("--data", "x"), ("--out", "b")):
        refused(train_lora, ["--resume", "a", *more], ("--resume", f"leave out {more[0]}"), capsys)
    changed = json.loads((tmp_path / "a" / "config.json").read_text())
    shutil.copytree(photos, tmp_path / "others")
    (tmp_path / "others" / "turned.txt").write_text("a building with a roof at night")
    (tmp_path / "a" / "config.json").write_text(json.dumps({**changed, "data": str(tmp_path / "others")}))
    refused(train_lora, ["--resume", "a", "--device", "cpu"], ("photos was", "is now"), capsys)
    (tmp_path / "a" / "config.json").write_text(json.dumps(changed))
    assert listing(tmp_path / "a").keys() == before.keys()
    assert train_lora.main(["--resume", "a", "--device", "cpu"]) == 0
    assert same_file(plain[0] / "runs/lora", Path("a"))
    monkeypatch.setattr(train_lora, "load_model", None)  # that is said before the model is loaded
    killed = {"pid": 2**30, "machine": socket.gethostname()}  # when all was written
    Path("a/lock.json").write_text(json.dumps(killed))
    refused(train_lora, ["--resume", "a", "--device", "cpu"], ("finished run", "nothing to resume"), capsys)
    assert not Path("a/lock.json").exists()


def test_what_may_change_on_resume_and_whose_run_it_is(sd1, photos, plain, capsys, monkeypatch):
    """Options that change no result need no --force; another method's run is refused, and unharmed."""
    stop(monkeypatch, *arguments(sd1, photos, "--out", "a"))
    before, words = listing(Path("a")), ("a is a run of train_lora.py; go on",)
    for force in ([], ["--force"]):
        refused(train_ti, ["--resume", "a", "--device", "cpu", *force], words, capsys)
    assert listing(Path("a")) == before
    more = ["--checkpointing", "--save-every", "1", "--preview-every", "2"]
    assert train_lora.main(["--resume", "a", "--device", "cpu", *more]) == 0
    assert same_file(plain[0] / "runs/lora", Path("a"))


def test_resumed_with_force(sd1, photos, tmp_path, capsys, monkeypatch):
    """All that differs is named, what is the same is not; if accepted, and it fits, it is used and kept."""
    photos = shutil.copytree(photos, tmp_path / "photos")
    stop(monkeypatch, *arguments(sd1, photos, "--out", "a", "--seed", "7"))
    before = json.loads(Path("a/config.json").read_text())
    resume = ["--resume", "a", "--device", "cpu"]
    # the seed's default is another than before
    more = ["--steps", "4", "--seed", "0", "--rank", str(before["rank"])]
    words = ("leave out --steps (was 3 and is now 4), --seed (was 7 and is now 0), or", "--force")
    refused(train_lora, [*resume, *more], words, capsys)
    refused(train_lora, [*resume, "--force", "--out", "b"], ("leave out --out",), capsys)
    refused(train_lora, ["--force"], ("--force is for", "--resume"), capsys)
    refused(train_lora, [*resume, "--force", "--rank", "7"], ("000002.pt does not fit", "leave out"), capsys)
    assert json.loads(Path("a/config.json").read_text()) == before
    (photos / "added.txt").write_text("a building with a roof")
    world.photos(1)[0][0].save(photos / "added.png")
    images = str(before["images"] + 1)
    assert train_lora.main([*resume, *more, "--images", images, "--force"]) == 0
    said = capsys.readouterr().out
    changed = f"images was {before['images']} and is now {images}"
    for told in (changed, "steps was 3 and is now 4", "photos was"):
        assert told in said, said
    after = json.loads(Path("a/config.json").read_text())
    assert {k for k in after if after[k] != before[k]} == {"steps", "seed", "images", "photos"}
    assert lora_file.read_file(Path("a/lora.safetensors"))[1]["ss_steps"] == "4"


def listing(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def shown_at(sheet) -> int:
    """The side of the pictures on a preview's sheet, which are enlarged to 192 by a whole number."""
    tile = np.asarray(Image.open(sheet).convert("RGB"))[-196:-4, 12:204]
    for side in (8, 16, 32, 48, 64, 96):
        blocks = tile.reshape(side, 192 // side, side, 192 // side, 3)
        if (blocks == blocks[:, :1, :, :1]).all():
            return side
    return 192


def refused(script, argv, words, capsys) -> None:
    capsys.readouterr()
    assert script.main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), (words, err)


def test_output_piped_in_another_encoding(monkeypatch):
    """As on Korean Windows: what cp949 cannot say is spelled out, and is no user's mistake."""
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp949")
    monkeypatch.setattr(sys, "stdout", pipe)
    assert report_errors(lambda argv: print("한옥 \U0001f525"))() == 0
    pipe.flush()
    assert pipe.buffer.getvalue().decode("cp949").strip() == "한옥 \\U0001f525"


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
])  # fmt: skip
def test_out_of_memory(error, capsys):
    def main(argv):
        raise error

    assert report_errors(main)() == 2
    err = capsys.readouterr().err
    assert "out of memory (" in err and "--micro-batch" in err and err.count("\n") == 1


# Single mistakes: robustness/test_mistakes.py


def test_an_unfinished_run_is_not_written_over(sd1, photos, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    words = [str(out), "holds an unfinished run", "--resume", "another --out"]
    refused(train_lora, arguments(sd1, photos, "--out", out), words, capsys)
    assert listing(tmp_path) == {"out/config.json": b"{}"}


def test_a_lora_for_another_architecture(sd1, sd2, load, tmp_path, capsys):
    """One that fits by name but not in width, and one that fits by name nowhere."""
    narrow = lora.insert(load(sd2), 2, 2)
    lora_file.save_file(tmp_path / "sd2.safetensors", narrow, {})
    lora.remove(load(sd2), narrow)
    tensors = {f"lora_unet_x.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")}
    save_file(tensors, tmp_path / "xl.safetensors")
    before = listing(tmp_path)
    wrong = {"sd2": ["goes 64 -> 64", "goes 32 -> 32"], "xl": ["0 of 1 modules matched", "lora_unet_x"]}
    for name, words in wrong.items():
        argv = ["*", "--model", sd1.folder, "--out", "out", "--lora", tmp_path / f"{name}.safetensors"]
        refused(sample, argv, [f"{name}.safetensors", "another architecture", *words], capsys)
    assert listing(tmp_path) == before
