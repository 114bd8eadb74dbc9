"""The scripts through their main([...]): odd photos in, a LoRA out, pictures drawn with it; and every kind of
bad input, answered in one sentence, with exit code 2 and nothing written."""

import hashlib
import importlib
import io
import json
import shutil
import sys
import warnings
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


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Default folders such as runs/lora land in the test's own; the notes on stderr are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)


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
    return [
        "--model",
        str(sd1.folder),
        "--data",
        str(photos),
        "--steps",
        "3",
        "--batch-size",
        "2",
        "--rank",
        "2",
        "--lr",
        "0.05",
        "--resolution",
        "32",
        "--device",
        "cpu",
        *map(str, more),
    ]


def hashes(sd) -> dict[str, str]:
    """Of every tensor of the base, by its name without LoRAs."""
    tensors = {
        **sd.unet.state_dict(prefix="unet."),
        **sd.vae.state_dict(prefix="vae."),
        **sd.text.encoder.state_dict(prefix="text."),
    }
    return {
        k.replace(".base.", "."): hashlib.sha256(t.numpy().tobytes()).hexdigest()
        for k, t in tensors.items()
        if not k.endswith((".down", ".up"))
    }


@pytest.fixture(scope="session")
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


# ------------------------------------------------------------------------------------------------- end to end


def test_train_lora(sd1, photos, tmp_path, capsys):
    """What is said before, and what appears; the odd photos are all used, the broken one is named."""
    assert train_lora.main(arguments(sd1, photos)) == 0
    said, out = capsys.readouterr().out, tmp_path / "runs" / "lora"
    for words in (
        "model ",
        "UNet of",
        "device cpu (named), fp32",
        "trains 146 LoRAs of rank 2",
        "'broken.png' cannot be read",
        "6 photos from",
        "2 with captions",
        "1 unreadable",
        "rotated by EXIF ('turned.jpg')",
        "over white",
        "became '*' 2 times, in 2 of 2 captions",
        "4 of 6 photos have no caption: 'a photo of *'",
        "steps/s; wrote runs/lora/lora.safetensors",
    ):
        assert words in said, (words, said)
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "index.html",
        "log.csv",
        "log.jsonl",
        "lora.safetensors",
        "previews",
    ]
    config = json.loads((out / "config.json").read_text())
    assert config["images"] == 6 and config["token"] == "*" and config["alpha"] == 2 and config["lr"] == 0.05
    row = json.loads((out / "log.jsonl").read_text())
    assert row["step"] == 3 and np.isfinite(row["loss"]) and row["skipped"] == 0
    tensors = load_file(out / "lora.safetensors")
    assert (
        len(tensors) == 3 * 146
    )  # 18 in the text encoder; all have learnt but who asks whom, where a level has one position only
    assert all(
        t.abs().max() > 0 for k, t in tensors.items() if "lora_up" in k and ("attn2" in k or "to_v" in k)
    )
    assert (
        lora_file.read_file(out / "lora.safetensors")[1].items()
        >= {
            "hanokdiff_token": "*",
            "ss_num_train_images": "6",
            "ss_steps": "3",
            "ss_resolution": "(32, 32)",
        }.items()
    )


def test_the_same_run_again_is_the_same_and_lands_beside(sd1, photos, tmp_path):
    for more in ((), (), ("--micro-batch", "1"), ("--seed", "1")):
        assert train_lora.main(arguments(sd1, photos, *more)) == 0
    one, again, split, other = (
        load_file(tmp_path / "runs" / f"lora{n}" / "lora.safetensors") for n in ("", "-2", "-3", "-4")
    )
    assert all(torch.equal(one[k], again[k]) for k in one)
    apart, far = (torch.cat([(one[k] - t[k]).abs().flatten() for k in one]).mean() for t in (split, other))
    # AdamW's first steps are the signs of gradients, some of them about zero
    assert far > 1e-3 and apart < 0.01 * far


def test_the_base_stays_frozen_to_the_bit(trained):
    out, before, after = trained
    assert len(before) > 500 and before == after
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "index.html",
        "log.csv",
        "log.jsonl",
        "lora-000002.safetensors",
        "lora.safetensors",
        "previews",
        "state",
    ]
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
    for n, at_once in ((4, 4), (3, 1), (5, 2)):
        drawn = draw(sd1, tmp_path / str(n), "--lora", file, "--n", n, "--batch-size", at_once)
        assert len(drawn) == n and np.abs(drawn[2] - alone).max() <= 1
        assert np.abs(drawn[1] - alone).max() > 5


def test_how_a_picture_was_made_is_in_it(sd1, trained, tmp_path, capsys):
    """The WebUI's text, numbered names that go on, a grid; the pseudo word comes from the LoRA."""
    file = trained[0] / "lora.safetensors"
    draw(
        sd1,
        tmp_path / "a",
        "--lora",
        f"{file}:0.7",
        "--n",
        2,
        "--seed",
        5,
        "--size",
        "48x64",
        "--negative",
        "snow",
        "--sampler",
        "euler_a",
        "--cfg",
        3,
        "--grid",
        prompts=["*, fire", "a barn"],
    )
    captured = capsys.readouterr()
    assert (
        'the prompt "a barn" does not contain "*"' in captured.err and "wrote 4 pictures to" in captured.out
    )
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


@pytest.mark.parametrize("script", ["train_lora", "sample", "clipscore"])
def test_help(script, capsys):
    with pytest.raises(SystemExit) as e:
        importlib.import_module(script).main(["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and f"python {script}.py" in out and out.count("\n  --") > 5
    assert all(len(line) < 130 for line in out.splitlines())


def test_help_tells_both_columns_of_defaults(capsys):
    with pytest.raises(SystemExit):
        train_lora.main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert (
        "(default: tiny 0.002, SD 0.0001)" in words and "rank of the change (default: tiny 16, SD 8)" in words
    )


# --------------------------------------------------------------------------------------------------- resuming


def test_stopped_and_resumed(sd1, photos, tmp_path, capsys, monkeypatch):
    """Ctrl-C after the second step; --resume needs no other option."""
    assert train_lora.main(arguments(sd1, photos, "--out", "whole")) == 0
    update = train_lora.Trainer.backward

    def stop(run, losses):
        update(run, losses)
        run.interrupted = run.step == 1

    monkeypatch.setattr(train_lora.Trainer, "backward", stop)
    with pytest.raises(SystemExit) as e:
        train_lora.main(arguments(sd1, photos, "--out", "a"))
    assert e.value.code == 130 and "stopped at step 2 of 3; go on with --resume a" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path / "a")
    for more, words in (
        (("--lr", "0.1"), ("--resume", "leave out --lr")),
        (("--data", "x"), ("leave out --data",)),
        (("--out", "b"), ("leave out --out",)),
    ):
        refused(train_lora, ["--resume", "a", *more], words, capsys)
    changed = json.loads((tmp_path / "a" / "config.json").read_text())
    shutil.copytree(photos, tmp_path / "others")
    (tmp_path / "others" / "turned.txt").write_text("a building with a roof at night")
    (tmp_path / "a" / "config.json").write_text(json.dumps({**changed, "data": str(tmp_path / "others")}))
    refused(train_lora, ["--resume", "a", "--device", "cpu"], ("photos was", "is now"), capsys)
    (tmp_path / "a" / "config.json").write_text(json.dumps(changed))
    assert listing(tmp_path / "a").keys() == before.keys()
    assert train_lora.main(["--resume", "a", "--device", "cpu"]) == 0
    whole, resumed = (load_file(tmp_path / d / "lora.safetensors") for d in ("whole", "a"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    monkeypatch.setattr(train_lora, "load_model", None)  # that is said before the model is loaded
    refused(train_lora, ["--resume", "a", "--device", "cpu"], ("finished run", "nothing to resume"), capsys)


def test_what_may_change_on_resume_and_whose_run_it_is(sd1, photos, capsys, monkeypatch):
    """Options that change no result need no --force; another method's run is refused even with it, and
    unharmed."""
    update = train_lora.Trainer.backward

    def stop(run, losses):
        update(run, losses)
        run.interrupted = run.step == 1

    assert train_lora.main(arguments(sd1, photos, "--out", "whole")) == 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_lora.Trainer, "backward", stop)
        train_lora.main(arguments(sd1, photos, "--out", "a"))
    before = {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()}
    for force in ([], ["--force"]):
        refused(
            train_ti,
            ["--resume", "a", "--device", "cpu", *force],
            ("a is a run of train_lora.py; go on",),
            capsys,
        )
    assert {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()} == before
    more = ["--checkpointing", "--save-every", "1", "--preview-every", "2"]
    assert train_lora.main(["--resume", "a", "--device", "cpu", *more]) == 0
    a, whole = (load_file(f"{run}/lora.safetensors") for run in ("a", "whole"))
    assert a.keys() == whole.keys() and all(torch.equal(a[k], whole[k]) for k in a)


def test_resumed_with_force(sd1, photos, tmp_path, capsys, monkeypatch):
    """All that differs is named, what is the same is not; if accepted, and if the tensors fit, it is used and
    kept."""
    update, photos = train_lora.Trainer.backward, shutil.copytree(photos, tmp_path / "photos")

    def stop(run, losses):
        update(run, losses)
        run.interrupted = run.step == 1

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_lora.Trainer, "backward", stop)
        train_lora.main(arguments(sd1, photos, "--out", "a", "--seed", "7"))
    before = json.loads(Path("a/config.json").read_text())
    resume = ["--resume", "a", "--device", "cpu"]
    # the seed's default is another than before
    more = ["--steps", "4", "--seed", "0", "--rank", str(before["rank"])]
    refused(
        train_lora,
        [*resume, *more],
        ("leave out --steps (was 3 and is now 4), --seed (was 7 and is now 0), or", "--force"),
        capsys,
    )
    refused(train_lora, [*resume, "--force", "--out", "b"], ("leave out --out",), capsys)
    refused(train_lora, ["--force"], ("--force is for", "--resume"), capsys)
    refused(train_lora, [*resume, "--force", "--rank", "7"], ("000002.pt does not fit", "leave out"), capsys)
    assert json.loads(Path("a/config.json").read_text()) == before
    (photos / "added.txt").write_text("a building with a roof")
    world.photos(1)[0][0].save(photos / "added.png")
    images = str(before["images"] + 1)
    assert train_lora.main([*resume, *more, "--images", images, "--force"]) == 0
    said = capsys.readouterr().out
    for told in (
        f"images was {before['images']} and is now {images}",
        "steps was 3 and is now 4",
        "photos was",
    ):
        assert told in said, said
    after = json.loads(Path("a/config.json").read_text())
    assert {k for k in after if after[k] != before[k]} == {"steps", "seed", "images", "photos"}
    assert lora_file.read_file(Path("a/lora.safetensors"))[1]["ss_steps"] == "4"


# -------------------------------------------------------------------------------------------------- bad input


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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    ],
)
def test_out_of_memory(error, capsys):
    def main(argv):
        raise error

    assert report_errors(main)() == 2
    err = capsys.readouterr().err
    assert "out of memory (" in err and "--micro-batch" in err and err.count("\n") == 1


def folder_with(tmp_path, **files) -> str:
    folder = tmp_path / "given"
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    return str(folder)


PNG = Image.new("RGB", (64, 64), "red")

TRAINING = {  # options beside the good ones, what the sentence must say
    "no folder": (["--data", "nowhere"], ["--data nowhere", "no such folder"]),
    "no data": (["--data", None], ["needs --data FOLDER"]),
    "steps": (["--steps", "-1"], ["--steps is -1", "greater than 0"]),
    "batch": (["--batch-size", "0"], ["--batch-size is 0", "greater than 0"]),
    "rank": (["--rank", "0"], ["--rank is 0", "greater than 0"]),
    "alpha": (["--alpha", "0"], ["--alpha is 0", "greater than 0"]),
    "rate": (["--lr", "nan"], ["--lr is nan", "finite"]),
    "infinite rate": (["--lr", "inf"], ["--lr is inf", "finite"]),
    "micro": (["--micro-batch", "-2"], ["--micro-batch is -2", "0 or more"]),
    "save": (["--save-every", "-2"], ["--save-every is -2", "0 or more"]),
    "weight": (["--min-snr", "nan"], ["--min-snr is nan", "finite"]),
    "text rank": (["--text-rank", "-2"], ["--text-rank is -2", "0 or more"]),
    "size": (["--resolution", "65"], ["65", "divisible by 8", "64"]),
    "images": (["--images", "7"], ["--images 7", "6 readable", "1 unreadable", "lower --images"]),
    "no images": (["--images", "0"], ["--images 0", "at least 1"]),
    "token": (["--token", " "], ["--token is empty"]),
    "word": (
        ["--token", "sks", "--replace", "a castle", "--caption", "x"],
        ["no caption contains 'sks'", "--replace"],
    ),
    "caption": (
        ["--images", "1", "--caption", "a photo", "--replace", "z"],
        ["no caption contains '*'", "--caption"],
    ),
    "model": (["--model", "nowhere"], ["nowhere", '"tiny"']),
    "device": (["--device", "abacus"], ["abacus", "cpu"]),
    "dtype": (["--dtype", "fp8"], ["fp8", "auto, fp32, bf16, fp16"]),
    "no run": (["--resume", "nowhere"], ["--resume"]),
}


@pytest.mark.parametrize("kind", TRAINING)
def test_bad_training_options(sd1, photos, tmp_path, capsys, kind):
    more, words = TRAINING[kind]
    argv = arguments(sd1, photos, "--out", tmp_path / "out")
    if more[1] is None:
        del argv[argv.index(more[0]) : argv.index(more[0]) + 2]
    else:
        argv += more
    if kind == "device":
        argv.remove("cpu"), argv.remove("--device")
    refused(train_lora, argv, words, capsys)
    assert not list(tmp_path.iterdir())


def test_resuming_nothing(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        refused(
            train_lora,
            ["--resume", name],
            [f"--resume {name}", "no run was started there", "config.json"],
            capsys,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(("script", "argv"), [
    (train_lora, ["--steps", "three"]), (train_lora, ["--targets", "everything"]), (train_lora, ["--stepz",
        "3"]),
    (train_lora, ["--step", "3"]), (sample, []), (sample, ["*", "--seed", "x"]), (sample, ["*", "--lor",
        "x"]),
])  # fmt: skip
def test_what_argparse_refuses(script, argv, capsys, tmp_path):
    """In one sentence too, without its twenty lines of usage."""
    refused(script, argv, [argv[-2]] if argv else ["nothing to draw"], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["empty", "unreadable", "no word"])
def test_bad_photo_folders(sd1, tmp_path, capsys, kind):
    files, words = {
        "empty": ({"notes_txt": b"hello"}, ["no pictures in it", ".png"]),
        "unreadable": (
            {"a_png": b"hello", "b_jpg": b"\xff\xd8\xff"},
            ["0 readable", "2 unreadable", "add photos"],
        ),
        "no word": ({"a_txt": b"a house"}, ["no caption contains '*'", "'a house'", "--replace", "--token"]),
    }[kind]
    folder = folder_with(tmp_path, **files)
    if kind == "no word":
        PNG.save(f"{folder}/a.png")
    before = listing(tmp_path)
    refused(train_lora, arguments(sd1, folder, "--out", tmp_path / "out"), words, capsys)
    assert listing(tmp_path) == before and not (tmp_path / "out").exists()


def damage_missing(folder):
    (folder / "vae" / "config.json").unlink()
    return ["vae/config.json", "is missing"]


def damage_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return ["unet", "no weights", "diffusion_pytorch_model.safetensors"]


def damage_shape(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "conv_in.weight": torch.zeros(320, 4, 3, 3)}, file)
    return ["conv_in.weight", "(320, 4, 3, 3)", "(32, 4, 3, 3)"]


def damage_end(folder):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    return ["vae/diffusion_pytorch_model.safetensors", "cannot be read", "incomplete"]


def damage_tokenizer(folder):
    for file in (folder / "tokenizer").iterdir():
        if file.name in ("merges.txt", "tokenizer.json"):
            file.unlink()
    return ["tokenizer", "is missing"]


@pytest.mark.parametrize(
    "damage", [damage_missing, damage_weights, damage_shape, damage_end, damage_tokenizer]
)
@pytest.mark.parametrize("script", [train_lora, sample])
def test_bad_models(sd1, photos, tmp_path, capsys, damage, script):
    folder, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(sd1.folder, folder)
    words = damage(folder)
    if script is train_lora:
        argv = [*arguments(sd1, photos, "--out", out), "--model", folder]
    else:
        argv = ["*", "--model", folder, "--out", out]
    refused(script, argv, words, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("holds", ["finished", "unfinished", "file"])
def test_bad_out(sd1, photos, tmp_path, capsys, holds):
    out = tmp_path / "out"
    if holds == "file":
        out.write_text("precious")
        words = ["is a file", "name a folder"]
    elif holds == "finished":
        folder_with(tmp_path, config_json=b"{}", lora_safetensors=b"precious")
        words = ["holds a finished run (lora.safetensors)", "another --out"]
    else:
        folder_with(tmp_path, config_json=b"{}", log_jsonl=b"precious")
        words = ["holds an unfinished run", "--resume", "another --out"]
    if holds != "file":
        (tmp_path / "given").rename(out)
    before = listing(tmp_path)
    refused(train_lora, arguments(sd1, photos, "--out", out), [str(out), *words], capsys)
    if holds == "file":
        refused(sample, ["*", "--model", sd1.folder, "--out", out], [str(out), *words], capsys)
    assert listing(tmp_path) == before


SAMPLING = {
    "sampler": (["--sampler", "plms"], ['sampler "plms"', "ddim", "dpmpp_2m_karras"]),
    "size": (["--size", "64x65"], ["height is 65", "divisible by 8", "64"]),
    "width": (["--size", "0x64"], ["width is 0", "divisible by 8"]),
    "no size": (["--size", "64"], ['--size is "64"', "WIDTHxHEIGHT"]),
    "steps": (["--steps", "-1"], ["--steps is -1", "at least 1"]),
    "many steps": (["--steps", "1001"], ["1001", "between 1 and 1000"]),
    "n": (["--n", "0"], ["--n is 0", "at least 1"]),
    "batch": (["--batch-size", "0"], ["--batch-size is 0", "at least 1"]),
    "seed": (["--seed", "-1"], ["--seed is -1", "between 0 and"]),
    "large seed": (["--seed", str(2**64)], [f"--seed is {2**64}"]),
    "guidance": (["--cfg", "nan"], ["--cfg is nan", "finite"]),
    "strength": (["--lora", "a.safetensors:inf"], ["--lora a.safetensors is inf", "finite"]),
    "lora": (["--lora", "nowhere.safetensors"], ["--lora nowhere.safetensors", "no such file"]),
    "model": (["--model", "nowhere"], ["nowhere", '"tiny"']),
}


@pytest.mark.parametrize("kind", SAMPLING)
def test_bad_sampling_options(sd1, tmp_path, capsys, kind):
    more, words = SAMPLING[kind]
    refused(sample, ["*", "--model", sd1.folder, "--out", tmp_path / "out", *more], words, capsys)
    assert not list(tmp_path.iterdir())


def test_a_lora_for_another_architecture(sd1, sd2, load, tmp_path, capsys):
    """One that fits by name but not in width, one that fits by name nowhere, and the trained one in the other
    model."""
    narrow = lora.insert(load(sd2), 2, 2)
    lora_file.save_file(tmp_path / "sd2.safetensors", narrow, {})
    lora.remove(load(sd2), narrow)
    save_file(
        {"lora_unet_x.lora_down.weight": torch.ones(2, 2), "lora_unet_x.lora_up.weight": torch.ones(2, 2)},
        tmp_path / "xl.safetensors",
    )
    before = listing(tmp_path)
    for name, words in (
        ("sd2", ["goes 64 -> 64", "goes 32 -> 32"]),
        ("xl", ["0 of 1 modules matched", "lora_unet_x"]),
    ):
        argv = [
            "*",
            "--model",
            sd1.folder,
            "--out",
            tmp_path / "out",
            "--lora",
            tmp_path / f"{name}.safetensors",
        ]
        refused(sample, argv, [f"{name}.safetensors", "another architecture", *words], capsys)
    assert listing(tmp_path) == before
